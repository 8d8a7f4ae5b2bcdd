"""A KL target for GRPO or RLOO: a callback adapts beta during training until the KL is near the target.

TRL's GRPOTrainer and RLOOTrainer keep the policy near its reference with a fixed coefficient, `beta`. The KL that results
from a given beta depends on model, reward and learning rate, and is known only after the run. It is easier to choose the
KL. A callback reads the KL that the trainer measures, in nats per token, and adapts beta until the KL is near the target.
Here beta starts at an arbitrary value, and every printed line shows how the controller changes it. The reward is VADER's
sentiment. A policy without a KL penalty soon exploits this reward with a list of positive words.

    python examples/grpo_adaptive_kl.py                         # GRPO on SmolLM2-135M, a CPU, a few minutes
    python examples/grpo_adaptive_kl.py --trainer rloo --steps 60
    python examples/grpo_adaptive_kl.py --model Qwen/Qwen2.5-0.5B-Instruct --batch-size 64 --steps 200      # a GPU

The reward needs pip install '.[demo]'. `trustkl report` reads bounds.jsonl in the output folder.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_trustkl import AdaptiveKLCallback, BoundReportCallback
from trl_trustkl.controllers import PIDKL
from trl_trustkl.demo.prompts import TRAIN_PROMPTS
from trl_trustkl.demo.rewards import sentiment
from trl_trustkl.demo.smollm2 import load_smollm2
from trl_trustkl.demo.task import quieten
from trl_trustkl.policy.cpu import computes_bf16

TRAINERS: dict[str, tuple[Any, Any]] = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


class PrintKL(TrainerCallback):
    """Prints a line for every update."""

    def __init__(self) -> None:
        self.kls: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "kl/measured" in logs:
            self.kls.append(logs["kl/measured"])
            print(
                f"update {state.global_step:3}   KL {logs['kl/measured']:7.4f}   target {logs['kl/target']:.4f}   "
                f"beta {logs['kl/coef']:.4f}   reward {logs['reward']:6.3f}",
                flush=True,
            )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "output_dir": options.output_dir,
        "beta": options.beta,
        "per_device_train_batch_size": options.batch_size,
        "num_generations": 4,
        "max_completion_length": options.tokens,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": computes_bf16(),  # TRL's own configurations do not look at the CPU
        "use_cpu": not gpu,
        "gradient_checkpointing": gpu,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=TRAINERS, default="grpo", help="(default: %(default)s)")
    parser.add_argument("--model", help="a name on the Hub, or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--target", type=float, default=0.1, help="KL to the reference, nats per token (%(default)s)")
    parser.add_argument("--beta", type=float, default=1.0, help="the coefficient at the start (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="updates (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="responses per update (%(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="maximum length of a response (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument("--output-dir", default="runs/grpo_adaptive_kl", help="for bounds.jsonl (%(default)s)")
    options = parser.parse_args(arguments)

    quieten()
    if options.model is None:
        model, tokenizer = load_smollm2(quantize=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto" if computes_bf16() else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer_class, config_class = TRAINERS[options.trainer]
    trainer = trainer_class(
        model=model,
        reward_funcs=sentiment,
        args=config_class(**settings(options)),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TRAIN_PROMPTS]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    printed = PrintKL()
    # These gains are for a run of a few dozen updates; the default ones suit a longer run.
    controller = PIDKL(coef=options.beta, target=options.target, kp=0.5, ki=0.08)
    trainer.add_callback(AdaptiveKLCallback(controller, trainer=trainer))
    trainer.add_callback(BoundReportCallback())
    trainer.add_callback(printed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    last = printed.kls[-max(1, len(printed.kls) // 3) :]
    mean = sum(last) / len(last)
    print(
        f"Over the last {len(last)} updates the KL was {mean:.4f} nats per token on average, {mean / options.target - 1:+.0%} "
        f"from the target of {options.target:g}; beta went from {options.beta:g} to {trainer.beta:.3g}."
    )


if __name__ == "__main__":
    main()
