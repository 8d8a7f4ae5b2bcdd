"""Evaluation: the policy's responses to held-out prompts, and some of them printed now and then.

A mixin of the trainer. It samples with random numbers of its own, so that a run is the same with and without it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerControl

from ..errors import ConfigError, RewardError, unknown_name
from ..masking import masked_sum
from ..policy.split_lm import as_in_training
from ..rollout import transformers_engine as generation
from ..rollout.prompts import TokenLimits, prepare_datasets
from ..run.rng import RngStream
from ..types import Prompts


class Evaluation:
    """See the module. The trainer that mixes it in has the phases `rollout` and `score`."""

    control: TrainerControl
    _room: TokenLimits

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample a response to every prompt of the evaluation set, always with the same random numbers.

        Metrics: `score`; `kl`, the exact KL(π‖π_ref) in nats per response; `length` in tokens; `eos_rate`; each behind
        `metric_key_prefix`. The training run is not affected: nothing it draws depends on it.
        """
        dataset = self._evaluation_set(eval_dataset)
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        started = time.perf_counter()
        rows = self.evaluate_completions(dataset)
        scores = [row["score"] for row in rows if not math.isnan(row["score"])]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in ("kl", "length", "eos_rate")}
        metrics = {"score": sum(scores) / len(scores) if scores else math.nan, **means}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_completions(self, eval_dataset: Any = None) -> list[dict[str, Any]]:
        """A sampled response to every prompt: `prompt`, `completion`, `score` (NaN where no function gave one), `kl`,
        `length` and `eos_rate` of each, from all processes."""
        dataset = self._evaluation_set(eval_dataset)
        if isinstance(dataset, dict):
            raise ConfigError(f"`eval_dataset` got several; name one of {', '.join(map(repr, dataset))}.")
        if "input_ids" not in dataset.column_names:
            dataset = prepare_datasets(dataset, None, self.processing_class, self._room, self.args)[0]
        return gather_object(self._evaluated(self._evaluation_batches(dataset)))

    def _evaluated(self, batches: Iterable[tuple[int, Prompts]]) -> list[dict[str, Any]]:
        """This process's rows. The processes may have different numbers of batches: only after them do they fail together."""
        rows: list[dict[str, Any]] = []
        failure: RewardError | None = None
        try:
            for batch in batches:
                rows += self._evaluate_prompts(*batch)
        except RewardError as error:
            failure = error
        self._raise_everywhere(failure)
        return rows

    def _evaluation_set(self, given: Any) -> Any:
        """What to evaluate on: a dataset or several of them, the trainer's own for None, one of those for a name."""
        own = self.eval_dataset
        if isinstance(given, str):
            if not isinstance(own, dict) or given not in own:
                raise unknown_name("eval_dataset", given, own if isinstance(own, dict) else ())
            return own[given]
        if given is None and own is None:
            raise ConfigError("`eval_dataset` got None; give one to the trainer or to evaluate().")
        return own if given is None else given

    def _evaluation_batches(self, dataset: Any) -> Iterator[tuple[int, Prompts]]:
        """This process's share of the prompts, in batches."""
        mine = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            yield start, self._collate([dataset[row] for row in mine[start : start + size]])

    def _evaluate_prompts(self, start: int, prompts: Prompts) -> list[dict[str, Any]]:
        training_key, self._sampling_key = getattr(self, "_sampling_key", None), (RngStream.EVALUATE, start)
        try:
            with as_in_training(self.model):
                scored = self.score(self.rollout(prompts))
        finally:
            self._sampling_key = training_key
        mask = scored.rollout.response_mask
        ended = generation.ends_with_stop(scored.rollout.response_ids, mask, self._stop_ids)
        columns = (scored.scores, masked_sum(scored.ref_kl, mask, dim=1), mask.sum(1).float(), ended.float())
        return [
            {"prompt": prompt, "completion": text, "score": score, "kl": kl, "length": length, "eos_rate": end}
            for prompt, text, score, kl, length, end in zip(
                self._prompt_texts(scored.rollout), scored.completions, *(c.tolist() for c in columns), strict=True
            )
        ]

    def _print_samples(self) -> None:
        """TRL's `num_sample_generations`: print completions of the evaluation set now and then."""
        wanted = self.args.num_sample_generations
        if self.eval_dataset is None or wanted <= 0:
            return
        if (self.state.global_step - 1) % max(1, self.args.num_total_batches // wanted) == 0:
            self.generate_completions(sampling=True)

    def generate_completions(self, sampling: bool = False) -> None:
        """Print prompts of the evaluation set with the policy's completions and scores; five of them with `sampling`."""
        if self.eval_dataset is None:
            return
        datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in datasets:
            rows = self._evaluated(islice(self._evaluation_batches(dataset), 1 if sampling else None))
            if self.is_world_process_zero():
                print_samples(rows[:5] if sampling else rows)


def print_samples(rows: list[dict[str, Any]]) -> None:
    """A table of prompts, completions and scores. Their text is data: no markup and no escape sequence in it is obeyed."""
    for row in rows:
        prompt, completion = (json.dumps(row[key], ensure_ascii=False) for key in ("prompt", "completion"))
        print(f"score {row['score']:+.3f}  prompt {prompt}\n              completion {completion}")
