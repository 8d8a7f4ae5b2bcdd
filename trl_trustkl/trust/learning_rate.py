"""The learning rate of one update, changed without the schedule noticing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ConfigError


def check_adaptable(optimizer: Any, field: str) -> None:
    """ConfigError for an optimizer that finds its own learning rate, on which a factor has no effect."""
    if any(group["lr"] is None or group.get("relative_step") for group in optimizer.param_groups):
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps it
        raise ConfigError(
            f"`{field}` adapts the learning rate of the optimizer, and this {name} computes its own; give "
            f"it a learning rate (Adafactor: relative_step=False), or leave {field} None."
        )


@contextmanager
def scaled_learning_rate(optimizer: Any, policy: Sequence[nn.Parameter] | None, factor: float) -> Iterator[None]:
    """Multiply the policy's scheduled learning rate by a factor inside the block; the schedule does not see it.

    policy: its parameters; None if the optimizer has no others.
    """
    of_policy = {id(p) for p in policy or ()}
    groups = [g for g in optimizer.param_groups if policy is None or any(id(p) in of_policy for p in g["params"])]
    scheduled = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate
