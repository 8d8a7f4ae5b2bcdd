"""A custom controller for the anchor's coefficient: a budget instead of a target.

The controllers of this package keep the KL to the reference *at* a target. When the KL is below the target they lower β,
even if the reward does not need a larger KL. This controller treats the target as a budget. When the KL is above it, β
rises immediately, by `up` for every multiple of the target; when the KL is below it, β decreases slowly, by `fade` per
update, but never below its initial value. A controller is a frozen dataclass with `init()`, which returns the first state,
and `update(state, kl=, episodes=)`, which returns the next one. Once it is registered in CONTROLLERS, the controller is an
option like the built-in ones: its arguments are checked, its state is saved in checkpoints, and its coefficient is recorded.

    python examples/custom_controller.py                            # SmolLM2 on a CPU, a few minutes
    python examples/custom_controller.py --model Qwen/Qwen2.5-0.5B-Instruct --updates 100       # a GPU
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.controllers import CONTROLLERS, State
from trl_trustkl.demo.prompts import TRAIN_PROMPTS
from trl_trustkl.demo.smollm2 import smollm2_path


@dataclass(frozen=True)
class BudgetKL:
    """β·(1 + up·(KL/target − 1)) above the target, β·(1 − fade) below it, and never below `coef`."""

    coef: float
    target: float
    up: float = 1.0
    fade: float = 0.05

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        over = kl / self.target - 1
        factor = 1 + self.up * over if over > 0 else 1 - self.fade
        return State(max(self.coef, state.coef * factor))


CONTROLLERS["budget"] = BudgetKL


def short_words(prompts, completions, **columns):
    """The share of words of up to three letters: easy to learn, and easy to exploit."""
    words = [text.split() for text in completions]
    return [sum(len(word) <= 3 for word in some) / max(len(some), 1) for some in words]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A custom controller, registered by name.")
    parser.add_argument("--model", help="a name or folder (default: SmolLM2-135M-Instruct, from the Hub or its wheel)")
    parser.add_argument("--updates", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, default=2.0, help="nats per response (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/custom_controller", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    name, gpu = options.model or smollm2_path(), torch.cuda.is_available()
    trainer = TrustKLPPOTrainer(
        args=TrustKLPPOConfig(
            output_dir=options.output_dir, max_steps=options.updates, response_length=24, temperature=1.0,
            kl_controller="budget", kl_coef=0.02, kl_target=options.budget, kl_controller_kwargs={"up": 0.5},
            per_device_train_batch_size=8, gradient_accumulation_steps=2, num_mini_batches=2, num_ppo_epochs=2,
            learning_rate=1e-3, lr_scheduler_type="constant", bf16=gpu, use_cpu=not gpu, gradient_checkpointing=gpu,
            save_strategy="no", logging_strategy="no", report_to="none",
        ),
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if gpu else torch.float32),
        processing_class=AutoTokenizer.from_pretrained(name),
        reward_funcs=short_words,
        train_dataset=Dataset.from_dict({"prompt": TRAIN_PROMPTS}),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    print(f"\nupdate   score   KL (nats/response, budget {options.budget:g})    β of the update")
    for record in load_records(options.output_dir):
        anchor = record["anchor"]
        print(f"{record['update']:6d}  {record['score']:6.3f}  {anchor['kl_exact']:6.2f} {anchor['coef']:36.4f}")


if __name__ == "__main__":
    main()
