"""The help text of `trustkl train`: about 250 options in sections."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..options import about
from ..ppo.config import TrustKLPPOConfig
from .parser import LISTED

_USAGE = """\
usage: trustkl train --config FILE.yaml [--option VALUE ...]
       trustkl train --model_name_or_path MODEL --dataset_name DATA
                     --reward_funcs FUNCTION ... --output_dir DIR [...]

TRAINER on TRL with an anchor and a trust region. Options come from a YAML file,
from flags, or from both; a flag overrides the file. DATA is a hub name, a
folder, or a .json, .jsonl, .csv or .parquet file; its column "prompt" has text
or lists of messages. A mixture of datasets is given in the YAML file, as in
TRL's scripts.
"""

_EPILOG = """
Several processes:
  accelerate launch --multi_gpu --num_processes 2 -m trl_trustkl train ...

Exit status: 0 for success; 1 for an error of the run; 2 for an error in the
options; 130 after Ctrl-C; 143 after SIGTERM.
"""

_SCRIPT, _MODEL, _ANCHOR, _TRUST = "data, rewards, models", "policy: precision and LoRA", "anchor", "trust region"
_OWN, _COMMON, _REST = "TRAINER", "training", "further options of transformers' TrainingArguments"
_SECTIONS = (_SCRIPT, _MODEL, _ANCHOR, _TRUST, _OWN, _COMMON, _REST)

# Those of transformers' many fields that most runs set.
_COMMON_FIELDS = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim", "bf16", "fp16", "use_cpu",
    "gradient_checkpointing", "seed", "logging_steps", "report_to", "run_name", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
}  # fmt: skip
_MODEL_FIELDS = {each.name for each in fields(ModelConfig)}
_SCRIPT_FIELDS = {each.name for each in (*fields(ScriptArguments), *fields(DatasetMixtureConfig))} | {
    "config", "trainer", "reward_funcs", "reward_model_name_or_path", "reward_weights", "ref_model", "value_model",
}  # fmt: skip
_TRAINING_FIELDS = {each.name for each in fields(TrainingArguments)}
# Fields that TRL's PPO trainer computes, that only TRL's scripts read, or that only accept their default here.
_HIDDEN = {"ignore_bias_buffers", "exp_name"} | {
    each.name for each in fields(TrustKLPPOConfig) if not about(each).group and each.name not in _TRAINING_FIELDS
}


def add_help(parser: argparse.ArgumentParser, trainer: str, config: type) -> None:
    """Add --help for the main options and --help-all for every option of a trainer with that configuration."""
    for flags, everything, help in (
        (("-h", "--help"), False, "print the main options"),
        (("--help-all",), True, "print every option"),
    ):
        parser.add_argument(
            *flags, action=_Help, help=help, text=partial(help_text, parser, trainer, config, everything=everything)
        )


def help_text(parser: argparse.ArgumentParser, trainer: str, config: type, *, everything: bool) -> str:
    """The help of a trainer's options."""
    groups = {each.name: about(each).group for each in fields(config)}
    formatter = _Formatter(parser.prog)
    # Without those that take no value: --no_x is the same as --x False.
    shown = [
        action for action in parser._actions if action.dest not in {*_HIDDEN, argparse.SUPPRESS} and action.nargs != 0
    ]
    for title in _SECTIONS if everything else _SECTIONS[:-1]:
        formatter.start_section(trainer if title == _OWN else title)
        formatter.add_arguments([action for action in shown if _section(action.dest, groups) == title])
        formatter.end_section()
    more = "" if everything else f"\n{_REST}:\n  trustkl train --help-all\n"
    return f"{_USAGE.replace('TRAINER', trainer)}\n{formatter.format_help()}{more}{_EPILOG}"


def _section(name: str, groups: dict[str, str]) -> str:
    if name in _SCRIPT_FIELDS:
        return _SCRIPT
    if name in _MODEL_FIELDS:
        return _MODEL
    if name in _COMMON_FIELDS:
        return _COMMON
    if (group := groups.get(name)) in (_ANCHOR, _TRUST):
        return group
    return _REST if name in _TRAINING_FIELDS else _OWN


class _Help(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str, text: Callable[[], str]) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        print(self._text(), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Each option once, spelled as in the dataclasses, with its choices, and its default unless that is None."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6, width=80)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        word = {"string_to_bool": "BOOL", "int": "INT", "float": "NUMBER"}.get(kind, "VALUE")
        return f"{action.option_strings[0]} {word}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        choices = [str(choice) for choice in action.choices or ()]
        if len(choices) <= LISTED and not all(choice in text for choice in choices):
            text += f" One of: {', '.join(choices)}."
        return text if action.default is None or action.default == [] else f"{text} (default: %(default)s)"
