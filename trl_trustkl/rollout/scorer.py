"""The scores of a rollout: the rewards of each reward function, and their weighted sum."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import NonFiniteRewardError, RewardError
from ..types import Logged, Rollout
from .reward_log import RewardLog, free_name
from .rewards import LARGEST_REWARD, RewardModel, reward_name, rewards_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_RESERVED = {
    *("prompt", "prompts", "completion", "completions", "completion_ids"),
    *("input_ids", "attention_mask", "trainer_state", "log_extra", "log_metric"),
}
"""Columns of a dataset that are not passed to reward functions, which get other values by these names."""


class Scores(NamedTuple):
    """by_function: the rewards of each function by its name, [B] numbers or None. total: their weighted sum [B] in
    float32, NaN where every function returned None. logged: what the functions logged."""

    by_function: dict[str, list[float | None]]
    total: Tensor
    logged: Logged


@dataclass
class Scorer:
    """Calls the reward functions, and adds up their rewards.

    batch_size: rows that a reward model reads at a time. retries: how often a function that failed is called again. wait:
    waits for some seconds before a retry; returns whether to give up.
    """

    funcs: Sequence[Callable[..., Any] | RewardModel]
    weights: Sequence[float]
    batch_size: int
    retries: int = 0
    wait: Callable[[float], bool] = threading.Event().wait

    def __call__(
        self,
        rollout: Rollout,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        state: Any,
    ) -> Scores:
        """The scores of a rollout with `prompts` and `completions` in the dataset's format; `state` is the trainer's.

        Raises RewardError for a function that raises an error or returns the wrong length, NaN or infinity, and for a sum
        that exceeds float32.
        """
        rows = rollout.rows or []
        names = dict.fromkeys(name for row in rows for name in row if name not in _RESERVED)
        columns = {name: [row.get(name) for row in rows] for name in names}
        keywords = {"completion_ids": completion_ids, "trainer_state": state, **columns}
        total = torch.zeros(len(completions), dtype=torch.float64)
        known = torch.zeros(len(completions), dtype=torch.bool)
        by_function: dict[str, list[float | None]] = {}
        logged = Logged({}, {})

        def attempt(func: Callable[..., Any] | RewardModel) -> tuple[list[float | None], RewardLog]:
            log = RewardLog(len(completions))  # a failed attempt leaves nothing
            given = {**keywords, "log_extra": log.log_extra, "log_metric": log.log_metric}
            return rewards_of(func, rollout, prompts, completions, given, self.batch_size), log

        for func, weight in zip(self.funcs, self.weights, strict=True):
            rewards, log = self._with_retries(partial(attempt, func))
            log.add_to(logged)
            by_function[free_name(reward_name(func), by_function)] = rewards
            values = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
            total += weight * values.nan_to_num(0.0)
            known |= ~values.isnan()
        if (total.abs() > LARGEST_REWARD).any():
            raise NonFiniteRewardError(
                f"the weighted rewards (reward_weights={self.weights}) add up to {float(total[total.abs().argmax()]):g}, "
                "which exceeds float32; scale the rewards or their weights down."
            )
        scores = torch.where(known, total, math.nan).float().to(rollout.response_ids.device)
        return Scores(by_function, scores, logged)

    def _with_retries(self, attempt: Callable[[], Result]) -> Result:
        for number in range(self.retries):
            try:
                return attempt()
            except RewardError as error:
                seconds = min(2.0**number, 60.0)
                logger.warning(f"{error} Trying again in {seconds:g} s ({number + 1} of {self.retries}).")
                if self.wait(seconds):
                    raise
        return attempt()
