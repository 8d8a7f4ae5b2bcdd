"""What reward functions log besides their rewards, through `log_extra` and `log_metric` as in TRL's GRPO."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

from ..errors import shown
from ..parallel.processes import Processes
from ..types import Logged

RESERVED = ("update", "prompt", "completion", "score", "ref_logp", "rewards", "kl", "length", "eos_rate")
"""The columns of completions that the trainer writes itself."""


class RewardLog:
    """Collects what one reward function logs of a batch of `count` completions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._logged = Logged({}, {})

    def log_extra(self, column: str, values: Any) -> None:
        """Add a column to the completions: one value for each. A name that is taken gets a number."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != self._count:
            raise ValueError(
                f"log_extra({column!r}) got {shown(values)}; it must be a list of {self._count} values, one per completion."
            )
        columns = self._logged.columns
        columns[free_name(str(column), {*RESERVED, *columns})] = [as_json(value) for value in values]

    def log_metric(self, name: str, value: Any) -> None:
        """Add a number to the logged metrics, which are means over the calls and the processes. NaN is left out."""
        if isinstance(value, (str, bytes)):
            raise TypeError(f"log_metric({name!r}) got {shown(value)}; it must be a number.")
        number = float(value)
        if not math.isnan(number):
            self._logged.metrics.setdefault(str(name), []).append(number)

    def add_to(self, logged: Logged) -> None:
        """Add everything to what other functions logged."""
        for name, column in self._logged.columns.items():
            logged.columns[free_name(name, {*RESERVED, *logged.columns})] = column
        for name, numbers in self._logged.metrics.items():
            logged.metrics.setdefault(name, []).extend(numbers)


def free_name(name: str, taken: Container[str]) -> str:
    """The name, with a number if it is taken."""
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def with_means(
    metrics: dict[str, Any], logged: Iterable[dict[str, list[float]]], processes: Processes
) -> dict[str, Any]:
    """The metrics, and the mean of each one that reward functions logged, over all batches of all processes."""
    numbers: dict[str, list[float]] = defaultdict(list)
    for each in processes.gather_objects(list(logged)):
        for name, values in each.items():
            numbers[name] += values
    found = dict(metrics)
    for name, values in sorted(numbers.items()):
        found[free_name(name, found)] = sum(values) / len(values)
    return found


def as_json(value: Any) -> Any:
    """The value if JSON has it, a scalar of NumPy or torch as its number, and anything else as text."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        json.dumps(value, allow_nan=isinstance(value, float))  # a record has null for a number that is not finite
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value
