"""Evaluation: sample and score responses to held-out prompts, and print some of them during training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from ..errors import ConfigError, RewardError, RolloutError, out_of_range, unknown_name
from ..masking import masked_sum
from ..parallel.processes import Processes
from ..parallel.sharding import REPLICATED, Replicated
from ..policy.probes import as_in_training
from ..records import as_rows
from ..report.text import visible
from ..rollout.prompts import Collator, prepare_dataset, prompt_texts
from ..rollout.reward_log import with_means
from ..rollout.sampling import Rollouts, ended
from ..run.failure_handling import raised_on_all
from ..run.signals import Overdue
from ..types import Prompts, Scored
from .config import TrustKLPPOConfig
from .models import Models


@dataclass
class Evaluator:
    """Samples a response to every prompt of a dataset, always with the same random numbers, and scores it.

    `score` samples and scores a batch of prompts. Its second argument is the batch's place in the dataset, which seeds the
    sampling, so that nothing depends on the training run.
    """

    args: TrustKLPPOConfig
    models: Models
    processes: Processes
    collate: Collator
    rollouts: Rollouts
    score: Callable[[Prompts, int], Scored]
    sharding: Replicated = REPLICATED

    def metrics(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        """Means over the dataset, each behind `prefix`, and the seconds it took."""
        started = time.perf_counter()
        rows, logged = self._evaluated(self._batches(self.tokenized(dataset)))
        rows = self.processes.gather_objects(rows)
        scores = [row["score"] for row in rows if not math.isnan(row["score"])]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in ("kl", "length", "eos_rate")}
        found = {"score": sum(scores) / len(scores) if scores else math.nan, **means}
        for name in sorted({name for row in rows for name in row["rewards"]}):
            known = [row["rewards"][name] for row in rows if not math.isnan(row["rewards"].get(name, math.nan))]
            found[f"rewards/{name}"] = sum(known) / len(known) if known else math.nan
        found = with_means(found, logged, self.processes)
        found["runtime"] = time.perf_counter() - started
        return {f"{prefix}_{key}": value for key, value in found.items()}

    def rows(self, dataset: Dataset) -> list[dict[str, Any]]:
        """One row for each prompt, from all processes."""
        rows, _ = self._evaluated(self._batches(self.tokenized(dataset)))
        return self.processes.gather_objects(rows)

    def tokenized(self, dataset: Dataset) -> Dataset:
        """The dataset with token ids, checked; as it is if it was prepared for the trainer."""
        own = self.models.evaluation
        if any(dataset is each for each in (own.values() if isinstance(own, dict) else [own])):
            return dataset
        return prepare_dataset(dataset, "eval_dataset", self.models.tokenizer, self.models.token_limits, self.args)

    def show(self, datasets: Dataset | dict[str, Dataset] | None, *, few: bool) -> None:
        """Print the main process's rows of each dataset; with `few`, only the first five."""
        for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
            if dataset is not None:
                rows, _ = self._evaluated(islice(self._batches(dataset), 1 if few else None))
                if self.processes.is_main:
                    print_samples(rows[:5] if few else rows)

    def _evaluated(
        self, batches: Iterable[tuple[int, Prompts]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, list[float]]]]:
        """This process's rows, and the metrics that reward functions logged of each batch. The processes may have different
        numbers of batches, so an error is raised at the end."""
        self.rollouts.weights_changed()  # outside a run, anyone may have changed them
        self.rollouts.sync()
        rows: list[dict[str, Any]] = []
        metrics: list[dict[str, list[float]]] = []
        with raised_on_all(self.processes, RewardError, RolloutError, Overdue):
            for place, prompts in batches:
                with as_in_training(self.models.trained):
                    scored = self.score(prompts, place)
                rows += self._rows(scored)
                metrics.append(scored.logged.metrics)
        return rows, metrics

    def _batches(self, dataset: Dataset) -> Iterator[tuple[int, Prompts]]:
        """This process's share of the prompts, in batches with their places. All shares are equal if parameters are sharded.

        Processes that share a vLLM sample in step; one that has no prompts left does so without any.
        """
        if self.sharding.sharded and (left := len(dataset) % self.processes.count):
            raise ConfigError(
                f"`eval_dataset` has {len(dataset)} rows, which {self.processes.count} processes cannot share equally; "
                f"with sharded parameters, they must. Leave out {left}: eval_dataset.select(range({len(dataset) - left}))."
            )
        most, mine = (range(index, len(dataset), self.processes.count) for index in (0, self.processes.index))
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(most), size):
            if rows := mine[start : start + size]:
                yield start, self.collate([dataset[row] for row in rows])
            elif self.args.vllm_tensor_parallel_size > 1:
                self.rollouts.engine.generate([], [])

    def _rows(self, scored: Scored) -> list[dict[str, Any]]:
        mask = scored.rollout.response_mask
        columns: dict[str, list[Any]] = {
            "prompt": prompt_texts(scored.rollout, self.models.tokenizer),
            "completion": scored.completions,
            "score": scored.scores.tolist(),
            "kl": masked_sum(scored.ref_kl, mask, dim=1).tolist(),
            "length": mask.sum(1).float().tolist(),
            "eos_rate": ended(scored.rollout, self.models.stop_ids).float().tolist(),
            **scored.logged.columns,
            "rewards": as_rows({name: each.tolist() for name, each in scored.rewards.items()}, len(scored.completions)),
        }
        return as_rows(columns)


def chosen_dataset(given: Any, own: Any) -> Any:
    """The dataset, or dict of them, to evaluate on: the trainer's for None, one of the trainer's for a name."""
    if isinstance(given, str):
        if not isinstance(own, dict) or given not in own:
            raise unknown_name("eval_dataset", given, own if isinstance(own, dict) else ())
        return own[given]
    if given is None and own is None:
        raise ConfigError("`eval_dataset` got None; give one to the trainer or to evaluate().")
    return own if given is None else given


def one_dataset(given: Any, own: Any) -> Any:
    """Like `chosen_dataset`, but raises ConfigError for a dict of datasets."""
    dataset = chosen_dataset(given, own)
    if isinstance(dataset, dict):
        raise ConfigError(f"`eval_dataset` got several; name one of {', '.join(map(repr, dataset))}.")
    return dataset


def compare_with_best(trainer: Any, metrics: dict[str, float], save: Callable[[], None]) -> None:
    """Let transformers compare an evaluation with the best one, and request a checkpoint of a better one with
    save_strategy='best'. ConfigError, after `save`, if the evaluation lacks `metric_for_best_model`."""
    try:
        better = trainer._determine_best_metric(metrics=metrics, trial=None)
    except KeyError:
        save()
        valid = f"one that evaluate() gives: {', '.join(repr(name.removeprefix('eval_')) for name in metrics)}"
        fix = "The last update is saved."
        raise out_of_range("metric_for_best_model", trainer.args.metric_for_best_model, valid, fix) from None
    if trainer.args.save_strategy == "best":
        trainer.control.should_save = better


def print_samples(rows: list[dict[str, Any]]) -> None:
    """Print prompts, completions and scores. Markup and escape sequences in their text are printed as they are."""
    for row in rows:
        prompt, completion = (visible(json.dumps(row[key], ensure_ascii=False)) for key in ("prompt", "completion"))
        print(f"score {row['score']:+.3f}  prompt {prompt}\n              completion {completion}")
