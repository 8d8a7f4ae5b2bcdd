"""The range of every number in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import is_finite, out_of_range
from .field_types import unquoted


class Range(NamedTuple):
    """What a field may be, in words and as a test of a finite number; `fix`: what to do instead of going beyond it."""

    valid: str
    holds: Callable[[Any], bool]
    fix: str = ""
    whole: bool = False
    optional: bool = False  # whether it may be None


def _positive(x: float) -> bool:
    return x > 0


def _not_negative(x: float) -> bool:
    return x >= 0


def _up_to_1(x: float) -> bool:
    return 0 <= x <= 1


def _below_1(x: float) -> bool:
    return 0 <= x < 1


_COUNT = Range("a whole number >= 1", _positive, whole=True)
_PER_TOKEN = Range("a positive number of nats per token, or None", _positive, "None turns it off.", optional=True)

RANGES: dict[str, Range] = {
    # the anchor
    "kl_coef": Range("a finite number >= 0", _not_negative, "0 turns the anchor off."),
    "kl_horizon": Range("a positive number of episodes", _positive, whole=True),
    "kl_target": Range("a positive number of nats per response, or None", _positive, optional=True),
    # the trust region
    "cliprange": Range("in (0, 1)", lambda x: 0 < x < 1, "Use clip_rule='none' to turn clipping off."),
    "cliprange_high": Range(
        "a finite number > 0, or None", _positive, "None means the same as cliprange.", optional=True
    ),
    "cliprange_value": Range("a finite number > 0", _positive, "Use clip_value=False to turn value clipping off."),
    "trust_coef": Range("a finite number >= 0", _not_negative, "0 turns the penalty off."),
    "trust_target": _PER_TOKEN,
    "trust_stop": _PER_TOKEN,
    "trust_max_kl": _PER_TOKEN,
    "trust_lr_target": _PER_TOKEN,
    "panic_kl": _PER_TOKEN,
    # advantages and values
    "gamma": Range("in [0, 1]", _up_to_1),
    "lam": Range("in [0, 1]", _up_to_1),
    "vf_coef": Range("a finite number >= 0", _not_negative),
    "missing_eos_penalty": Range("a finite number >= 0, or None", _not_negative, optional=True),
    # sampling and measuring
    "temperature": Range("a finite number > 0", _positive, "Near-greedy sampling is temperature=0.01."),
    "response_length": _COUNT,
    "local_rollout_forward_batch_size": _COUNT,
    "stop_token_id": Range("a whole number >= 0, or None", _not_negative, whole=True, optional=True),
    "measure_fraction": Range("in (0, 1]", lambda x: 0 < x <= 1, "There is no way to turn the measurement off."),
    # the steps
    "learning_rate": Range("a finite number >= 0", _not_negative),
    "value_learning_rate": Range("a finite number >= 0, or None", _not_negative, optional=True),
    "max_grad_norm": Range("a finite number >= 0, or None", _not_negative, "0 or None turns it off.", optional=True),
    "weight_decay": Range("a finite number >= 0", _not_negative),
    "adam_epsilon": Range("a finite number >= 0", _not_negative),
    "adam_beta1": Range("in [0, 1)", _below_1),
    "adam_beta2": Range("in [0, 1)", _below_1),
    "num_ppo_epochs": _COUNT,
    "num_mini_batches": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    # the run
    "num_train_epochs": Range("a positive number", _positive),
    "max_steps": Range(
        "a whole number >= 1, or -1", lambda x: x >= 1 or x == -1, "-1: total_episodes decides.", whole=True
    ),
    "total_episodes": Range("a positive whole number, or None", _positive, whole=True, optional=True),
    "dataset_num_proc": Range("a whole number >= 1, or None", _positive, whole=True, optional=True),
    "seed": Range("a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, whole=True),
    "max_refused": _COUNT,
    "reward_retries": Range("a whole number >= 0", _not_negative, "0 turns retrying off.", whole=True),
    "grace_seconds": Range("a finite number of seconds >= 0", _not_negative),
}


def check_ranges(args: Any) -> None:
    """Raise ConfigError for the first number outside of its range."""
    for name, each in RANGES.items():
        value = getattr(args, name)
        if value is None and each.optional:
            continue
        if not is_finite(value) or (each.whole and not isinstance(value, int)) or not each.holds(value):
            raise out_of_range(name, value, each.valid, unquoted(value) or each.fix)
