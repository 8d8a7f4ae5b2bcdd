"""The scores of a rollout: each reward function by itself, and their weighted sum."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteRewardError, RewardError
from ..types import Rollout
from .rewards import LARGEST_REWARD, RewardModel, reward_name, rewards_of

logger = logging.getLogger(__name__)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class Scores(NamedTuple):
    """by_function: what each reward function said, by its name, [B] numbers or None. total: their weighted sum [B] in
    float32, NaN where every function said None."""

    by_function: dict[str, list[float | None]]
    total: Tensor


class Scorer:
    """Asks the reward functions, and adds up what they say.

    Args:
        funcs: callables and reward models, as `build_rewards` returns them.
        weights: one for each.
        batch_size: rows that a reward model reads at a time.
        retries: how often a function that failed is called again.
        wait: sleeps for some seconds before that; returns whether to give up.
    """

    def __init__(
        self,
        funcs: Sequence[Callable[..., Any] | RewardModel],
        weights: Sequence[float],
        *,
        batch_size: int,
        retries: int = 0,
        wait: Callable[[float], bool] = _sleep,
    ) -> None:
        self.funcs = list(funcs)
        self.weights = list(weights)
        self._batch_size = batch_size
        self._retries = retries
        self._wait = wait

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

        Raises RewardError for a function that raises, or returns the wrong length, NaN or infinity, and for a sum that
        float32 cannot hold.
        """
        keywords = {"completion_ids": completion_ids, "trainer_state": state, **_columns(rollout.rows)}
        total = torch.zeros(len(completions), dtype=torch.float64)
        known = torch.zeros(len(completions), dtype=torch.bool)
        by_function: dict[str, list[float | None]] = {}
        for func, weight in zip(self.funcs, self.weights, strict=True):
            ask = partial(rewards_of, func, rollout, prompts, completions, keywords, self._batch_size)
            rewards = self._with_retries(ask)
            by_function[_free_name(reward_name(func), by_function)] = rewards
            values = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
            total += weight * values.nan_to_num(0.0)
            known |= ~values.isnan()
        if (total.abs() > LARGEST_REWARD).any():
            raise NonFiniteRewardError(
                f"the weighted rewards (reward_weights={self.weights}) add up to {float(total[total.abs().argmax()]):g}, "
                "beyond what float32 holds; scale the rewards or their weights down."
            )
        return Scores(by_function, torch.where(known, total, math.nan).float().to(rollout.response_ids.device))

    def _with_retries(self, attempt: Callable[[], list[float | None]]) -> list[float | None]:
        for number in range(self._retries):
            try:
                return attempt()
            except RewardError as error:
                seconds = min(2.0**number, 60.0)
                logger.warning(f"{error} Trying again in {seconds:g} s ({number + 1} of {self._retries}).")
                if self._wait(seconds):
                    raise
        return attempt()


def _free_name(name: str, taken: dict[str, Any]) -> str:
    """The name, with a number where another function has it already."""
    names = (name if count == 1 else f"{name}_{count}" for count in range(1, len(taken) + 2))
    return next(each for each in names if each not in taken)


def _columns(rows: list[dict[str, Any]] | None) -> dict[str, list[Any]]:
    """Extra dataset columns, each a list of B values."""
    reserved = {"prompt", "completion", "input_ids", "attention_mask", "completion_ids", "trainer_state"}
    reserved |= {"prompts", "completions"}  # what every reward function gets by these names
    names = [name for name in (rows[0] if rows else {}) if name not in reserved]
    return {name: [row[name] for row in rows or []] for name in names}
