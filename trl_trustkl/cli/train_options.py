"""The options of `trustkl train`: dataclasses of TRL and of this package, read from flags and a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..errors import ConfigError, did_you_mean
from ..ppo.config import TrustKLPPOConfig
from . import train_help


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, the rewards, and the models other than the policy."""

    reward_funcs: list[str] | None = _option(
        "Reward functions, each as package.module.function, as path/to/file.py:function, or as the name or folder of a "
        "reward model."
    )
    reward_model_name_or_path: str | None = _option(
        "A reward model. It precedes those of reward_funcs, also in reward_weights."
    )
    ref_model: str | None = _option(
        "The reference model, loaded like the policy. By default, the policy before training."
    )
    value_model: str | None = _option("The value model, trained in full. By default, a value head on the policy.")

    def __post_init__(self) -> None:
        funcs: Any = self.reward_funcs
        if isinstance(funcs, str):  # YAML may write the one function without a list
            self.reward_funcs = [funcs]


class Options(NamedTuple):
    """The options of a command line."""

    script: TrainArguments
    training: TrustKLPPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


_DATACLASSES = (TrainArguments, TrustKLPPOConfig, ModelConfig, DatasetMixtureConfig)

# Fields that only TRL's script reads, and those that replace them here.
_ELSEWHERE = {"sft_model_path": "model_name_or_path", "reward_model_path": "reward_model_name_or_path"}


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line and of its YAML file, which flags override. ConfigError if they are invalid."""
    parser = TrlParser(_DATACLASSES, prog="trustkl train", allow_abbrev=False, add_help=False)
    train_help.add_help(parser)
    given = _split_config(arguments)
    try:
        *parsed, unknown = parser.parse_args_and_config(given, return_remaining_strings=True)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, ImportError, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from None
    if unknown:
        raise _unknown_option(unknown, parser)
    options = Options(*parsed[: len(_DATACLASSES)])
    _check(options)
    return options


def _split_config(arguments: Sequence[str]) -> list[str]:
    """`--config=file` as two words, the only form that TRL's parser accepts. ConfigError if the file does not exist."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words:
        rest = words[words.index("--config") + 1 :]
        if not rest or not Path(rest[0]).is_file():
            raise ConfigError(f"`config` got {rest[0] if rest else None!r}; it must be a YAML file of options.")
    return words


def _unknown_option(unknown: list[str], parser: argparse.ArgumentParser) -> ConfigError:
    names = [option for action in parser._actions for option in action.option_strings]
    hint = did_you_mean(unknown[0].split("=")[0], names, show=str) or " All options: trustkl train --help-all."
    return ConfigError(f"unknown option {' '.join(unknown)}.{hint}")


def _check(options: Options) -> None:
    """The checks that the dataclasses do not make."""
    script, training, model, mixture = options
    defaults = {each.name: each.default for each in fields(TrustKLPPOConfig)}
    for name, instead in _ELSEWHERE.items():
        if getattr(training, name) != defaults[name]:
            raise ConfigError(f"`{name}` got {getattr(training, name)!r}; trustkl train takes `{instead}`.")
    if not model.model_name_or_path:
        raise ConfigError("`model_name_or_path` got None; it must be the name or folder of a causal language model.")
    if bool(script.dataset_name) == bool(mixture.datasets):
        raise ConfigError(
            f"`dataset_name` got {script.dataset_name!r} and `datasets` {mixture.datasets!r}; give exactly one: a name, a "
            "folder or a file of prompts, or a mixture of datasets in the YAML file."
        )
    if not script.reward_funcs and not script.reward_model_name_or_path:
        raise ConfigError(
            "`reward_funcs` got nothing; give package.module.function, file.py:function, or a reward model's name."
        )
