"""The fields of transformers' TrainingArguments that have a range here, and the error for what transformers rejects."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError, shown
from ..options import COUNT, NOT_NEGATIVE, POSITIVE, Range, about, inherited, option
from ..trl_compat import ppo_base
from ..trl_compat.version import PPOConfig

trl = partial(inherited, ppo_base.PPOConfig)
"""Default and help text of a field of TRL's, which is declared again because it has a unit or a range."""

_BELOW_1 = Range("in [0, 1)", lambda x: 0 <= x < 1)
_EVERY = Range("an integer >= 0, or a share of the run's updates below 1", lambda x: x >= 0 and (x < 1 or x == int(x)))


@dataclass
class TrainingFields(PPOConfig):
    """The base of `TrustKLPPOConfig`."""

    # fmt: off
    weight_decay: float = option(*trl("weight_decay"), range=NOT_NEGATIVE)
    adam_beta1: float = option(*trl("adam_beta1"), range=_BELOW_1)
    adam_beta2: float = option(*trl("adam_beta2"), range=_BELOW_1)
    adam_epsilon: float = option(*trl("adam_epsilon"), range=POSITIVE)
    per_device_train_batch_size: int = option(*trl("per_device_train_batch_size"), range=COUNT)
    per_device_eval_batch_size: int = option(*trl("per_device_eval_batch_size"), range=COUNT)
    gradient_accumulation_steps: int = option(*trl("gradient_accumulation_steps"), range=COUNT)
    num_train_epochs: float = option(*trl("num_train_epochs"), range=Range("a positive number"))
    max_steps: int = option(
        *trl("max_steps"), range=Range("an integer >= 1, or -1", lambda x: x >= 1 or x == -1),
        fix="-1 means that total_episodes gives the length of the run.")
    logging_steps: float = option(*trl("logging_steps"), range=_EVERY)
    eval_steps: float | None = option(*trl("eval_steps"), range=_EVERY)
    save_steps: float = option(*trl("save_steps"), range=_EVERY)
    seed: int = option(*trl("seed"), range=Range("an integer from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32))
    # fmt: on


OPTIMIZER = ("optim", "optim_args", "optim_target_modules")
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
"""The fields that transformers reads to build each of them."""


def only_transformers_checks(args: Any) -> list[str]:
    """The fields that were set and have no check here beyond their type. Left out are switches, which transformers' errors
    name."""
    unchecked = TrainingArguments.__dataclass_fields__.keys() - {"output_dir", "debug"}
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(args)
        if each.name in unchecked and about(each).range is None
    }
    given = {name: getattr(args, name) for name in defaults}
    return [name for name, value in given.items() if not isinstance(value, bool) and value != defaults[name]]


@contextmanager
def rejected_by_transformers(names: Collection[str]) -> Iterator[None]:
    """Raise an error of transformers as a ConfigError, which names the fields that it may be about."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        listed = " for " + ", ".join(f"`{name}`" for name in names) if names else ""
        raise ConfigError(
            f"transformers rejects this configuration: {shown(error)}; see its TrainingArguments{listed}."
        ) from error
