"""The learning rate of one update, changed without the schedule noticing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


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
