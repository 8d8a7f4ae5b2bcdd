"""The options of `trustkl train`: dataclasses of TRL and of this package, read from flags and a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..errors import ConfigError, did_you_mean, shown, unknown_name
from ..grpo.config import TrustKLGRPOConfig, TrustKLRLOOConfig
from ..ppo.config import TrustKLPPOConfig
from . import train_help
from .parser import Parser


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


Trainer: TypeAlias = Literal["ppo", "grpo", "rloo"]


@dataclass
class RewardArguments(ScriptArguments):
    """TRL's script arguments, the trainer and the rewards."""

    trainer: Trainer = field(default="ppo", metadata={"help": "The trainer; --trainer grpo --help has its options."})
    reward_funcs: list[str] | None = _option(
        "Reward functions, each as package.module.function, as path/to/file.py:function, as one of TRL's such as "
        "accuracy_reward, or as the name or folder of a reward model."
    )
    reward_model_name_or_path: str | None = _option(
        "A reward model. It precedes those of reward_funcs, also in reward_weights."
    )

    def __post_init__(self) -> None:
        funcs: Any = self.reward_funcs
        if isinstance(funcs, str):  # YAML may write the one function without a list
            self.reward_funcs = [funcs]


@dataclass
class TrainArguments(RewardArguments):
    """Those of PPO: the models other than the policy, too."""

    ref_model: str | None = _option(
        "The reference model, loaded like the policy. By default, the policy before training."
    )
    value_model: str | None = _option("The value model, trained in full. By default, a value head on the policy.")


class Options(NamedTuple):
    """The options of a command line."""

    script: RewardArguments
    training: Any  # a TrustKLPPOConfig, TrustKLGRPOConfig or TrustKLRLOOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


CONFIGS: dict[Trainer, type] = {"ppo": TrustKLPPOConfig, "grpo": TrustKLGRPOConfig, "rloo": TrustKLRLOOConfig}

# Fields that only TRL's script reads, and those that replace them here.
_ELSEWHERE = {"sft_model_path": "model_name_or_path", "reward_model_path": "reward_model_name_or_path"}


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line and of its YAML file, which flags override. ConfigError if they are invalid."""
    given = _split_config(arguments)
    parser = build_parser(_trainer(given))
    try:
        parsed = parser.parse_args_and_config(given)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, ImportError, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from None
    options = Options(*parsed[: len(Options._fields)])
    _check(options)
    return options


def dataclasses_of(trainer: Trainer) -> tuple[type, ...]:
    """The dataclasses with a trainer's options, in the order of `Options`."""
    script = TrainArguments if trainer == "ppo" else RewardArguments
    return script, CONFIGS[trainer], ModelConfig, DatasetMixtureConfig


class _Parser(Parser, TrlParser):
    """TRL's parser, which rejects unknown and missing options before it builds the dataclasses."""

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        checkpoint = options.get("resume_from_checkpoint")
        if isinstance(checkpoint, bool):  # its type is text
            options["resume_from_checkpoint"] = str(checkpoint)
        if unknown := super().set_defaults_with_config(**options):
            raise _unknown_option(unknown, self)
        return []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise _unknown_option(unknown, self)
        _check_given(parsed)
        return parsed, []


def build_parser(trainer: Trainer) -> TrlParser:
    """The parser of a trainer's options."""
    parser = _Parser(dataclasses_of(trainer), prog="trustkl train", allow_abbrev=False, add_help=False)
    train_help.add_help(parser, trainer.upper(), CONFIGS[trainer])
    return parser


def _trainer(given: list[str]) -> Trainer:
    """The trainer of a command line, or of its YAML file; ConfigError for one that does not exist."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--trainer")
    first.add_argument("--config")
    words, _ = first.parse_known_args([*given, ""] if given[-1:] == ["--trainer"] else given)
    options = {} if words.config is None else _read_config(words.config)
    name = options.get("trainer") if words.trainer is None else words.trainer
    if name is None:
        return "ppo"
    if not isinstance(name, str) or name not in CONFIGS:
        raise unknown_name("trainer", name, CONFIGS)
    return name


def _read_config(file: str) -> dict[str, Any]:
    """The options of a YAML file, in the encoding in which TRL's parser will read it; ConfigError if it is not a mapping."""
    try:
        options = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"`config` got {file!r}, which cannot be read: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"`config` got {file!r}, which must contain a YAML mapping of options to values.")
    # TRL passes them on as keyword arguments.
    if strange := [key for key in options if not isinstance(key, str) or key == "self"]:
        raise ConfigError(
            f"`config` got {file!r} with {strange[0]!r}, which is not an option; see trustkl train --help-all."
        )
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


_REQUIRED = {
    ("model_name_or_path",): "the name or folder of a causal language model",
    ("dataset_name", "datasets"): "a name, a folder or a file of prompts; or `datasets`, a mixture, in the YAML file",
    (
        "reward_funcs",
        "reward_model_name_or_path",
    ): "package.module.function, file.py:function, or a reward model's name",
}
"""Options of which one is required, and what it takes."""


def _check_given(parsed: argparse.Namespace) -> None:
    """ConfigError that names all required options that are missing."""
    missing = [
        f"--{names[0]}: {what}" for names, what in _REQUIRED.items() if not any(getattr(parsed, name) for name in names)
    ]
    if missing:
        raise ConfigError("\n    ".join(["required options are missing:", *missing]))


_ON = {"use_peft": ("lora_", "use_rslora", "use_dora"), "load_in_4bit": ("bnb_4bit_", "use_bnb_")}
"""The field of ModelConfig without which fields that begin like these have no effect."""


def _check_adapter(model: ModelConfig) -> None:
    """ConfigError for options of an adapter, or of quantization, that would be ignored."""
    for each in fields(model):
        default = each.default_factory() if callable(each.default_factory) else each.default
        for switch, names in _ON.items():
            if each.name.startswith(names) and not getattr(model, switch) and getattr(model, each.name) != default:
                got = shown(getattr(model, each.name))
                raise ConfigError(
                    f"`{each.name}` got {got} without `{switch}`, and would be ignored; set --{switch} too."
                )


def _check(options: Options) -> None:
    """The checks that the dataclasses do not make."""
    script, training, model, mixture = options
    _check_adapter(model)
    defaults = {each.name: each.default for each in fields(training)}
    for name, instead in _ELSEWHERE.items():
        if name in defaults and getattr(training, name) != defaults[name]:
            raise ConfigError(f"`{name}` got {getattr(training, name)!r}; trustkl train takes `{instead}`.")
    if script.dataset_name and mixture.datasets:
        raise ConfigError(
            f"`dataset_name` got {script.dataset_name!r} and `datasets` {mixture.datasets!r}; give exactly one: a name, a "
            "folder or a file of prompts, or a mixture of datasets in the YAML file."
        )
