"""Evaluation: the policy's responses to held-out prompts, and some of them printed now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, RewardError, unknown_name
from ..masking import masked_sum
from ..parallel.processes import Processes
from ..policy.split_lm import as_in_training
from ..rollout.prompts import prompt_texts
from ..rollout.sampling import ends_with_stop
from ..types import Prompts, Scored


class Evaluator:
    """Samples a response to every prompt of a dataset, always with the same random numbers, and scores it.

    Args:
        score: samples and scores a batch of prompts. The number beside it is its place in the dataset: what is drawn
            depends on it, and on nothing of the training run.
        collate: makes a batch of dataset rows.
        tokenize: adds the column `input_ids` to a dataset and checks it.
        model: put into the mode of training, as the kernels of a forward pass may depend on it.
        tokenizer: the policy's.
        stop_ids: the tokens that end a response.
        processes: share the prompts.
        batch_size: prompts of a batch on one process.
    """

    def __init__(
        self,
        *,
        score: Callable[[Prompts, int], Scored],
        collate: Callable[[list[dict[str, Any]]], Prompts],
        tokenize: Callable[[Dataset], Dataset],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        processes: Processes,
        batch_size: int,
    ) -> None:
        self._score = score
        self._collate = collate
        self._tokenize = tokenize
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._processes = processes
        self._batch_size = batch_size

    def metrics(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        """Means over the dataset, each behind `prefix`, and the seconds it took."""
        started = time.perf_counter()
        rows = self.rows(dataset)
        scores = [row["score"] for row in rows if not math.isnan(row["score"])]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in ("kl", "length", "eos_rate")}
        found = {"score": sum(scores) / len(scores) if scores else math.nan, **means}
        return {f"{prefix}_{key}": value for key, value in found.items()} | {
            f"{prefix}_runtime": time.perf_counter() - started
        }

    def rows(self, dataset: Dataset) -> list[dict[str, Any]]:
        """One row for each prompt, from all processes."""
        if "input_ids" not in dataset.column_names:
            dataset = self._tokenize(dataset)
        return self._processes.gather_objects(self._evaluated(self._batches(dataset)))

    def show(self, datasets: Dataset | dict[str, Dataset] | None, *, few: bool) -> None:
        """Print rows of this process's share, where it is the main one; five of each dataset with `few`."""
        for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
            if dataset is not None:
                rows = self._evaluated(islice(self._batches(dataset), 1 if few else None))
                if self._processes.is_main:
                    print_samples(rows[:5] if few else rows)

    def _evaluated(self, batches: Iterable[tuple[int, Prompts]]) -> list[dict[str, Any]]:
        """This process's rows. The processes may have different numbers of batches: only after them do they fail together."""
        rows: list[dict[str, Any]] = []
        failure: RewardError | None = None
        try:
            for place, prompts in batches:
                rows += self._evaluate(prompts, place)
        except RewardError as error:
            failure = error
        self._processes.raise_on_all(failure)
        return rows

    def _batches(self, dataset: Dataset) -> Iterator[tuple[int, Prompts]]:
        """This process's share of the prompts, in batches with their places."""
        mine = range(self._processes.index, len(dataset), self._processes.count)
        for start in range(0, len(mine), self._batch_size):
            yield start, self._collate([dataset[row] for row in mine[start : start + self._batch_size]])

    def _evaluate(self, prompts: Prompts, place: int) -> list[dict[str, Any]]:
        with as_in_training(self._model):
            scored = self._score(prompts, place)
        mask = scored.rollout.response_mask
        ended = ends_with_stop(scored.rollout.response_ids, mask, self._stop_ids)
        columns = (scored.scores, masked_sum(scored.ref_kl, mask, dim=1), mask.sum(1).float(), ended.float())
        texts = prompt_texts(scored.rollout, self._tokenizer)
        return [
            {"prompt": prompt, "completion": text, "score": score, "kl": kl, "length": length, "eos_rate": end}
            for prompt, text, score, kl, length, end in zip(
                texts, scored.completions, *(c.tolist() for c in columns), strict=True
            )
        ]


def chosen_dataset(given: Any, own: Any) -> Any:
    """What to evaluate on: a dataset or several of them, the trainer's own for None, one of those for a name."""
    if isinstance(given, str):
        if not isinstance(own, dict) or given not in own:
            raise unknown_name("eval_dataset", given, own if isinstance(own, dict) else ())
        return own[given]
    if given is None and own is None:
        raise ConfigError("`eval_dataset` got None; give one to the trainer or to evaluate().")
    return own if given is None else given


def one_dataset(given: Any, own: Any) -> Any:
    """As `chosen_dataset`, where it has to be one."""
    dataset = chosen_dataset(given, own)
    if isinstance(dataset, dict):
        raise ConfigError(f"`eval_dataset` got several; name one of {', '.join(map(repr, dataset))}.")
    return dataset


def print_samples(rows: list[dict[str, Any]]) -> None:
    """A table of prompts, completions and scores. Their text is data: no markup and no escape sequence in it is obeyed."""
    for row in rows:
        prompt, completion = (json.dumps(row[key], ensure_ascii=False) for key in ("prompt", "completion"))
        print(f"score {row['score']:+.3f}  prompt {prompt}\n              completion {completion}")
