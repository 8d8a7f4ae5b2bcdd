"""Compare clip rules: how much of the gradient each of them removes, and how far the policy moves nevertheless.

It is often said that clipping keeps the ratio within [0.8, 1.2]. In fact, a clip removes the gradient of tokens whose ratio
has already left the range. Gradients of other tokens, the optimizer's momentum, and the step that crosses the limit still
move ratios out of the range. Therefore read three columns together: the share of the gradient that was gated, the largest
ratio after an update, and the KL of an update. A rule that gates more does not necessarily move the policy less. Compare
`ppo`, whose gradient is zero outside the range, with `rollback` and `spo`, which pull ratios back, with `gspo`, which uses
the ratio of an entire response, and with `none`.

    python examples/compare_clip_rules.py                           # SmolLM2 on a CPU, a few minutes
    python examples/compare_clip_rules.py --rules all --model Qwen/Qwen2.5-0.5B-Instruct --updates 50       # a GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.demo.prompts import TRAIN_PROMPTS
from trl_trustkl.demo.smollm2 import smollm2_path
from trl_trustkl.surrogates import SURROGATES


def short_words(prompts, completions, **columns):
    """The share of words of up to three letters: easy to learn, and easy to exploit."""
    words = [text.split() for text in completions]
    return [sum(len(word) <= 3 for word in some) / max(len(some), 1) for some in words]


def run(rule: str, options: argparse.Namespace) -> list[dict]:
    """The records of a run with this rule. All other settings and the seed are the same for every rule."""
    gpu, folder = torch.cuda.is_available(), Path(options.output_dir) / rule
    TrustKLPPOTrainer(
        args=TrustKLPPOConfig(
            output_dir=str(folder), max_steps=options.updates, response_length=24, temperature=1.0, clip_rule=rule,
            kl_coef=0.02, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_mini_batches=4,
            num_ppo_epochs=3, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, bf16=gpu,
            use_cpu=not gpu, gradient_checkpointing=gpu, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if gpu else torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        reward_funcs=short_words,
        train_dataset=Dataset.from_dict({"prompt": TRAIN_PROMPTS}),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()  # fmt: skip
    return load_records(folder)


def row(rule: str, records: list[dict]) -> str:
    trust = [record["trust"] for record in records]
    gated = sum(each["gated"] for each in trust) / len(trust)
    kl = sum(each["kl"] for each in trust) / len(trust)
    ratio = max(each["max_ratio"] for each in trust)
    score, drift = records[-1]["score"], records[-1]["anchor"]["kl_exact"]
    return f"{rule:9} {gated:7.1%} {ratio:12.4g} {kl:10.4f} {drift:10.2f} {score:8.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare clip rules on one task and one seed.")
    parser.add_argument("--rules", nargs="+", default=["ppo", "rollback", "spo", "gspo", "none"], help="or: all")
    parser.add_argument("--model", help="a name or folder (default: SmolLM2-135M-Instruct, from the Hub or its wheel)")
    parser.add_argument("--updates", type=int, default=6, help="updates of each run (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/compare_clip_rules", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    options.model = options.model or smollm2_path()
    rules = list(SURROGATES) if options.rules == ["all"] else options.rules
    rows = [row(rule, run(rule, options)) for rule in rules]
    print("\nrule        gated        ratio     update     to ref    score")
    print("\n".join(rows))
    print(
        "\ngated: share of the gradient that the rule removed; ratio: the largest ratio\n"
        "after an update; update: mean KL(π_old‖π) in nats per token; to ref: KL(π‖π_ref)\n"
        "at the end in nats per response. cliprange is 0.2 for all rules, but the paper\n"
        "of gspo uses 3e-4."
    )


if __name__ == "__main__":
    main()
