"""CompletionsCallback: shows the completions of the latest update wherever metrics are logged, as TRL's GRPO does."""

from __future__ import annotations

import math
import random
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import pandas as pd
from transformers import TrainerCallback
from trl.trainer.utils import print_prompt_completions_sample

from ..report.text import visible
from ..rollout.reward_log import RESERVED, free_name


class CompletionsCallback(TrainerCallback):
    """Prints a table of completions with their rewards and logged columns, if rich is installed, and logs it to Weights &
    Biases and Trackio, if `report_to` names them. `completions.jsonl` has all completions anyway.

    count: how many completions are printed; None: all of the update.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._rows: list[dict[str, Any]] = []

    def on_record(self, args: Any, state: Any, control: Any, *, completions: list[dict[str, Any]], **_: Any) -> None:
        """Called by the trainer on the first process, after each update."""
        self._rows = completions

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not self._rows or "update" not in (logs or {}):
            return
        rows, self._rows = self._rows, []
        for tracker in (sys.modules.get(name) for name in ("wandb", "trackio") if name in args.report_to):
            if tracker is not None and getattr(tracker, "run", tracker) is not None:
                columns = as_columns(rows)
                table = {"step": [state.global_step] * len(rows), **columns.texts, **columns.rewards, **columns.extra}
                tracker.log({"completions": tracker.Table(dataframe=pd.DataFrame(table))})
        if find_spec("rich") is None:
            return
        if self._count is not None and self._count < len(
            rows
        ):  # by a separate stream, so that training is not affected
            rows = random.Random(state.global_step).sample(rows, self._count)
        texts, rewards, extra = as_columns(rows)
        prompts, completions = (_printable(texts[name]) for name in ("prompt", "completion"))
        shown = {name: _printable(values) for name, values in extra.items()}
        print_prompt_completions_sample(prompts, completions, rewards, None, state.global_step, extra=shown)


def shown_completions(args: Any) -> list[CompletionsCallback]:
    """The callback that `log_completions` asks for, if any."""
    return [CompletionsCallback(args.num_completions_to_print)] if args.log_completions else []


class Columns(NamedTuple):
    """The columns of a table of completions. texts: prompt and completion. rewards: the score, and the reward of each function
    if there are several; NaN for one that is not known. extra: what reward functions log with `log_extra`."""

    texts: dict[str, list[Any]]
    rewards: dict[str, list[float]]
    extra: dict[str, list[Any]]


def as_columns(rows: list[dict[str, Any]]) -> Columns:
    """The rows of `completions.jsonl` as columns."""
    rewards = {"score": [_number(row["score"]) for row in rows]}
    functions = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    for name in functions if len(functions) > 1 else []:
        rewards[free_name(name, rewards)] = [_number(row["rewards"].get(name)) for row in rows]
    extra: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in RESERVED):
        extra[free_name(name, {"step", *rewards})] = [row.get(name) for row in rows]
    return Columns({name: [row[name] for row in rows] for name in ("prompt", "completion")}, rewards, extra)


def _printable(value: Any) -> Any:
    """Texts, also those within lists and messages, without escape sequences that a terminal would act on."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
