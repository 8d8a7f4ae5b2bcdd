"""Custom rewards with dataset columns as arguments, rows without a reward, and several weighted functions.

A reward function has GRPO's signature, f(prompts, completions, **columns). Every column of the dataset but `prompt` is passed
as a list with one value per completion. The function returns one number per completion, or None for a completion that it does
not judge. Here some prompts ask for a word and some set a limit on the number of words, and each function judges only one
of the two. The score of a row is the weighted sum of its numbers. A row for which every function returns None has no reward
and contributes no gradient. The prompts are lists of messages, so completions are lists of messages too; `text_of` extracts
their text.

    python examples/custom_reward.py                            # SmolLM2 on a CPU, a few minutes
    python examples/custom_reward.py --model Qwen/Qwen2.5-0.5B-Instruct --updates 100       # a GPU
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.demo.smollm2 import smollm2_path

WEIGHTS = [1.0, 0.5]  # of mentions_word and keeps_limit
THINGS = (
    "a walk by the sea",
    "a market in the morning",
    "an old clock",
    "a train at night",
    "the first snow",
    "a garden",
)
ROWS = [
    row
    for thing in THINGS
    for row in (
        {"request": f"Write a sentence about {thing}. Use the word quiet.", "word": "quiet", "limit": None},
        {"request": f"Describe {thing} in at most eight words.", "word": None, "limit": 8},
        {"request": f"Describe {thing} in at most twelve words. Use the word bright.", "word": "bright", "limit": 12},
        {"request": f"Write about {thing}.", "word": None, "limit": None},  # not judged by any function
    )
]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def mentions_word(prompts, completions, word, **columns):
    """1 if the completion has the requested word, 0 if not, None if no word was requested."""
    pairs = zip(completions, word, strict=True)
    return [None if each is None else float(each in text_of(completion).lower()) for completion, each in pairs]


def keeps_limit(prompts, completions, limit, **columns):
    """0 within the limit of words, decreasing to −1 at twice the limit or more; None without a limit."""
    pairs = [(len(text_of(completion).split()), most) for completion, most in zip(completions, limit, strict=True)]
    return [None if most is None else -min(max(words / most - 1, 0.0), 1.0) for words, most in pairs]


def prompts() -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row.pop("request")}], **row} for row in map(dict, ROWS)]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Two reward functions that judge different rows.")
    parser.add_argument("--model", help="a name or folder (default: SmolLM2-135M-Instruct, from the Hub or its wheel)")
    parser.add_argument("--updates", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/custom_reward", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    name, gpu = options.model or smollm2_path(), torch.cuda.is_available()
    trainer = TrustKLPPOTrainer(
        args=TrustKLPPOConfig(
            output_dir=options.output_dir, max_steps=options.updates, response_length=24, temperature=1.0,
            reward_weights=WEIGHTS, kl_controller="adaptive", kl_target=4.0, kl_horizon=100,
            per_device_train_batch_size=8, gradient_accumulation_steps=2, num_mini_batches=2, num_ppo_epochs=2,
            learning_rate=1e-3, lr_scheduler_type="constant", bf16=gpu, use_cpu=not gpu, gradient_checkpointing=gpu,
            save_strategy="no", logging_strategy="no", report_to="none",
        ),
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if gpu else torch.float32),
        processing_class=AutoTokenizer.from_pretrained(name),
        reward_funcs=[mentions_word, keeps_limit],
        train_dataset=prompts(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    print("\nupdate   score (mean over rows that have one)   KL to the reference (nats/response)")
    for record in load_records(options.output_dir):
        print(f"{record['update']:6d} {record['score']:7.3f} {record['anchor']['kl_exact']:41.2f}")


if __name__ == "__main__":
    main()
