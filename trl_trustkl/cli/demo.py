"""`trustkl demo`: fine-tune a small language model towards positive sentiment, and report what bounded it."""

from __future__ import annotations

import argparse

from ..demo import run as demo

HELP = "fine-tune SmolLM2-135M with QLoRA PPO and report what bounded every update"
DESCRIPTION = (
    "Fine-tunes SmolLM2-135M-Instruct with QLoRA and PPO towards replies of positive sentiment (VADER). An adaptive controller "
    "keeps the KL to the reference near a target, the updates are clipped, and every update is recorded."
)
OPTIONS = {
    "output_dir": "folder for the records and the adapter",
    "updates": "number of updates",
    "kl_target": "target of the KL to the reference, in nats per response",
    "kl_coef": "initial KL coefficient",
    "cliprange": "clip range of the ratio",
    "learning_rate": "learning rate",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    for name, help in OPTIONS.items():
        default = demo.Options._field_defaults[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"{help} (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    return demo.run(demo.Options(**{name: getattr(options, name) for name in OPTIONS}))
