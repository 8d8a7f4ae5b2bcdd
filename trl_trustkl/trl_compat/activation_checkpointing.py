"""Activation checkpointing by the names that the installed transformers has; the older ones warn of their removal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OLD, _NEW = "gradient_checkpointing", "activation_checkpointing"


def adopt_fields(args: Any) -> None:
    """Copy TRL's fields `gradient_checkpointing` and `gradient_checkpointing_kwargs` to their new names, if there are any."""
    for suffix in ("", "_kwargs"):
        if getattr(args, f"{_NEW}{suffix}", False) is None:
            setattr(args, f"{_NEW}{suffix}", getattr(args, f"{_OLD}{suffix}"))


def enable(model: Any, kwargs: dict[str, Any] | None) -> None:
    """Switch it on for a model of transformers or PEFT."""
    name = _NEW if hasattr(model, f"{_NEW}_enable") else _OLD
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": kwargs})


def disable(model: Any) -> None:
    """Switch it off."""
    name = _NEW if hasattr(model, f"{_NEW}_disable") else _OLD
    getattr(model, f"{name}_disable")()


def is_enabled(model: Any) -> bool:
    """Whether it is on."""
    return getattr(model, f"is_{_NEW if hasattr(model, f'is_{_NEW}') else _OLD}")


@contextmanager
def without_warning() -> Iterator[None]:
    """Ignore the warning where PEFT uses the old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"`is_{_OLD}` is deprecated", category=FutureWarning)
        yield
