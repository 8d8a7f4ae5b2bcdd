"""The exceptions of the package.

Each message names the field, the value received, the valid range and the likely fix.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable

LONGEST_SHOWN = 200
"""Characters of a value that a message repeats."""


class TrustKLError(Exception):
    """Base of all errors that this package raises."""


class ConfigError(TrustKLError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""


class NotAvailableYetError(ConfigError, NotImplementedError):
    """An option of TRL, transformers, accelerate or DeepSpeed that this package does not support."""


class DataError(TrustKLError, ValueError):
    """A dataset, prompt, tokenizer or record that cannot be used."""


class RewardError(TrustKLError, ValueError):
    """A reward function that failed, or returned something that is not a list of rewards."""


class NonFiniteRewardError(RewardError):
    """A reward of NaN or infinity; the trainer rejects the update that it belongs to."""


class RolloutError(TrustKLError, RuntimeError):
    """A rollout engine that failed: it cannot be reached, stopped, or has other weights than the policy."""


class ModelError(TrustKLError, ValueError):
    """A model, adapter or combination of models that cannot be trained."""


class CheckpointError(TrustKLError, ValueError):
    """A checkpoint that is incomplete, or cannot be resumed from."""


class SaveError(TrustKLError, OSError):
    """A checkpoint or a record that could not be written."""


class RefusedError(TrustKLError, RuntimeError):
    """Too many updates in a row were rejected and rolled back."""


class MissingPackageError(TrustKLError, ImportError):
    """A package that only some features need, and that is not installed."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C ended the run after its state was saved. Uncaught, it exits with 128 + the signal: 143 or 130."""

    def __init__(self, signal: int) -> None:
        super().__init__(128 + signal)
        self.code: int = 128 + signal
        self.signal = signal


def require_packages(user: str, *names: str) -> None:
    """MissingPackageError unless all packages of these names can be imported. user: what needs them, as in "A report"."""
    if missing := [name for name in names if not _is_installed(name)]:
        raise MissingPackageError(
            f"{user} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Fix: pip install {' '.join(missing)}"
        )


def _is_installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as a stand-in
        return True
    return spec is not None and spec.origin is not None  # a folder of that name has none


def shown(value: object) -> str:
    """A value's repr for a message, truncated where it is long; a description where `repr` fails."""
    try:
        text = repr(value)
    except Exception:  # for example an integer of thousands of digits
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def is_finite(value: object) -> bool:
    """Whether `value` is a finite int or float that fits into a float; bools are not."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def unknown_name(field: str, value: object, options: Iterable[str]) -> ConfigError:
    """The error for a name outside a fixed set, with the names that exist and the nearest as a suggestion."""
    names = sorted(set(options))
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return ConfigError(f"`{field}` got {shown(value)}; it must be one of {', '.join(map(repr, names))}.{hint}")


def did_you_mean(value: str, names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """ " Did you mean 'ppo'?" with the nearest of the names; nothing where none is near."""
    near = difflib.get_close_matches(value[:LONGEST_SHOWN], list(names), n=1)
    return f" Did you mean {show(near[0])}?" if near else ""


def out_of_range(field: str, value: object, valid: str, fix: str = "") -> ConfigError:
    """The error for a number outside its range: `valid` says which range, `fix` what to do instead."""
    return ConfigError(f"`{field}` got {shown(value)}; it must be {valid}.{' ' + fix if fix else ''}")


def option_names(function: Callable[..., object]) -> list[str]:
    """The names of a function's keyword-only arguments."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check_options(field: str, name: str, valid: Iterable[str], given: Iterable[str]) -> None:
    """ConfigError unless every name in `given` is an option of `name`; `field` is the field of the configuration that holds
    them."""
    valid = list(valid)
    for option in given:
        if not valid:
            raise ConfigError(f"`{field}` got {shown(option)}, but {name!r} takes no options; leave it empty.")
        if option not in valid:
            raise unknown_name(field, option, valid)
