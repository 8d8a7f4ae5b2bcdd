"""`trustkl demo`: fine-tune a small language model towards positive sentiment, and report what bounded it."""

from __future__ import annotations

import argparse
from typing import Any

from ..demo import grpo
from ..demo import run as ppo
from ..errors import ConfigError
from ..files import create_folder

HELP = "fine-tune SmolLM2-135M with PPO or GRPO and report what bounded every update"
DESCRIPTION = (
    "Fine-tunes SmolLM2-135M-Instruct towards replies of positive sentiment (VADER), and records every update. With PPO and "
    "QLoRA, an adaptive controller keeps the KL to the reference near a target, and the updates are clipped. With GRPO and "
    "LoRA, a hard limit keeps each update small at a learning rate that is far too high without it."
)
OPTIONS = {
    "output_dir": "folder for the records and the adapter",
    "updates": "number of updates",
    "kl_target": "target of the KL to the reference, in nats per response",
    "kl_coef": "initial KL coefficient",
    "cliprange": "clip range of the ratio",
    "max_kl": "hard limit of each update, in nats per token",
    "learning_rate": "learning rate",
    "seed": "seed",
}
TRAINERS: dict[str, Any] = {"ppo": ppo, "grpo": grpo}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--trainer", choices=TRAINERS, default="ppo", help="the trainer (default: %(default)s)")
    for name, help in OPTIONS.items():
        defaults = {
            trainer: demo.Options._field_defaults[name]
            for trainer, demo in TRAINERS.items()
            if name in demo.Options._fields
        }
        values = list(dict.fromkeys(map(str, defaults.values())))
        said = values[0] if len(values) == 1 else ", ".join(f"{trainer} {value}" for trainer, value in defaults.items())
        only = "" if len(defaults) == len(TRAINERS) else f"{next(iter(defaults)).upper()} only; "
        kind = type(next(iter(defaults.values())))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{help} ({only}default: {said})")


def run(options: argparse.Namespace) -> int:
    demo = TRAINERS[options.trainer]
    given = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in demo.Options._fields:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` got {given[name]}; the demo with --trainer {options.trainer} has no such option."
            )
    chosen = demo.Options(**given)
    create_folder("output_dir", chosen.output_dir)
    return demo.run(chosen)
