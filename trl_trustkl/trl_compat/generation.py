"""What TRL's GRPO and RLOO trainers keep of a generation batch: its tokens, how long it is used, its metrics and completions.

The attributes read here are private to TRL. They are the same from TRL 1.12 to 1.16.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from ..errors import ModelError
from ..types import MicroBatch, indices
from .trl_trainers import GenerationTrainer

_NEEDED = ("_buffered_inputs", "_step", "_metrics", "_logs")
NO_IMAGES = (
    "with which this version of TrustRegionCallback cannot measure a divergence; train on prompts of text, without a column "
    "`image` or `images`, or remove the callback"
)


def generates(trainer: Any) -> bool:
    """Whether the trainer makes generation batches as GRPO and RLOO do."""
    args = getattr(trainer, "args", None)
    return all(hasattr(trainer, name) for name in _NEEDED) and hasattr(args, "steps_per_generation")


def images(trainer: GenerationTrainer) -> str | None:
    """Where the prompts of training have images, if that is known without a pass over a stream: a column, or a prompt."""
    dataset = trainer.train_dataset
    for name in getattr(dataset, "column_names", None) or ():
        if name in ("image", "images"):
            return f"the column {name!r}"
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names or not len(dataset):
        return None
    prompt = dataset[0]["prompt"]
    parts = [part for message in prompt for part in message["content"] or ()] if isinstance(prompt, list) else []
    found = any(isinstance(part, dict) and part.get("type") == "image" for part in parts)
    return "an image in the first prompt" if found else None


def passes_per_generation(trainer: GenerationTrainer) -> int:
    """Training passes (micro-batches) for which one generation batch is used: all of its micro-batches, `num_iterations`
    times."""
    return trainer.args.steps_per_generation * trainer.args.num_iterations


def steps_are_shared(trainer: GenerationTrainer) -> bool:
    """Whether an optimizer step may use two generation batches of which one is used by another step too: by the settings, or
    because the last `train()` ended between the passes of a step."""
    generation, step = passes_per_generation(trainer), trainer.args.gradient_accumulation_steps
    return (generation % step != 0 and step % generation != 0) or passes(trainer) % min(generation, step) != 0


def passes(trainer: GenerationTrainer) -> int:
    """The number of training passes made."""
    return trainer._step


def current_micro_batch(trainer: GenerationTrainer) -> int:
    """The index of the micro-batch of the last training pass in its generation batch."""
    return (trainer._step - 1) % trainer.args.steps_per_generation


def end_of_generation(trainer: GenerationTrainer) -> int:
    """The number of training passes after which the generation batch of the last pass is not used any more."""
    each = passes_per_generation(trainer)
    return ((trainer._step - 1) // each + 1) * each


def micro_batches(trainer: GenerationTrainer) -> list[MicroBatch]:
    """The current generation batch of this process, in TRL's micro-batches with TRL's padding. The response tokens that count
    are those with a loss: a tool's output is masked out. ModelError for a batch with images, as from a tool."""
    found, first = [], 0
    for part in trainer._buffered_inputs or []:
        if "pixel_values" in part:
            raise ModelError(f"the generation batch has images, {NO_IMAGES}.")
        ids, mask = part["completion_ids"], part["completion_mask"]
        counts = mask * part["tool_mask"] if "tool_mask" in part else mask
        found.append(
            MicroBatch(
                rows=torch.arange(first, first + len(ids), device=ids.device),
                input_ids=torch.cat([part["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([part["prompt_mask"], mask], dim=1),
                position_ids=None,
                response_ids=ids,
                response_mask=counts.bool(),
                token_indices=indices(counts),
            )
        )
        first += len(ids)
    return found


class NewMetrics:
    """Reads what a trainer has appended to the metrics of training since the last reading."""

    def __init__(self, trainer: GenerationTrainer) -> None:
        self._trainer = trainer
        self._read: dict[str, tuple[list[float], int]] = {}

    def take(self) -> dict[str, list[float]]:
        """The new values by their names."""
        found = {}
        for name, values in self._trainer._metrics["train"].items():
            known, count = self._read.get(name, (None, 0))
            found[name] = values[count if values is known else 0 :]  # after a log, TRL makes new lists
            self._read[name] = (values, len(values))
        return {name: values for name, values in found.items() if values}


class Completion(NamedTuple):
    """One row of a generation batch.

    rewards: of each function by its name; None where it gave none. score: their weighted sum; None where no function gave a
    reward, or where two functions have one name, of which TRL keeps only the second's. extra: what the functions logged with
    `log_extra`.
    """

    prompt: str
    completion: str
    score: float | None
    rewards: dict[str, float | None]
    extra: dict[str, Any]


def completions(trainer: GenerationTrainer) -> list[Completion]:
    """The rows that were generated last, of all processes."""
    logs, count = trainer._logs, trainer.args.generation_batch_size

    def last(column: Any) -> list[Any]:
        return list(column)[-count:]

    names = trainer.reward_func_names
    weights = dict(zip(names, trainer.reward_weights.tolist(), strict=True)) if len({*names}) == len(names) else {}
    rewards = {name: last(logs["rewards"][name]) for name in names}
    extra = {name: last(column) for name, column in logs["extra"].items() if len(column) >= count}
    found = []
    for i, (prompt, text) in enumerate(zip(last(logs["prompt"]), last(logs["completion"]), strict=True)):
        own = {name: None if math.isnan(column[i]) else column[i] for name, column in rewards.items()}
        logged = {name: column[i] for name, column in extra.items()}
        found.append(Completion(_text(prompt), _text(text), _total(weights, own), own, logged))
    return found


def scores(trainer: GenerationTrainer) -> Tensor | None:
    """The scores of this process's rows of the current generation batch, [B], in the order of `micro_batches`; NaN for none.

    TRL shuffles the rows after it has logged them. They are identified by their advantages and, where rows of equal advantages
    have different scores, by the texts of completion and prompt. None where that is not enough.
    """
    parts = trainer._buffered_inputs or []
    count, process = sum(len(part["completion_ids"]) for part in parts), trainer.accelerator.process_index
    here = slice(process * count, (process + 1) * count)
    known = [each.score for each in completions(trainer)[here]]
    rows: list[tuple[Any, ...]] = [()] * count
    logged: list[tuple[Any, ...]] = [()] * len(known)
    for name in ("advantages", "completion", "prompt"):
        column = list(trainer._logs[name])[-trainer.args.generation_batch_size :][here]
        column = column if name == "advantages" else [_contents(each) for each in column]
        logged = [(*key, value) for key, value in zip(logged, column, strict=True)]
        rows = [(*key, value) for key, value in zip(rows, _of_rows(trainer, parts, name, column), strict=True)]
        by_key = dict(zip(logged, known, strict=True))
        told_apart = all(by_key[key] == score for key, score in zip(logged, known, strict=True))
        if parts and told_apart and Counter(rows) == Counter(logged):
            found = [math.nan if (score := by_key[key]) is None else score for key in rows]
            return torch.tensor(found, dtype=torch.float64, device=parts[0]["completion_ids"].device)
    return None


def _of_rows(
    trainer: GenerationTrainer, parts: Sequence[dict[str, Tensor]], name: str, logged: Sequence[Any]
) -> list[Any]:
    """What the rows of the batch have in place of the values in a `logged` column."""
    if name == "advantages":
        return [each if isinstance(each, float) else None for part in parts for each in part[name].tolist()]
    decode = trainer.processing_class.batch_decode
    decoded = [text for part in parts for text in decode(part[f"{name}_ids"], skip_special_tokens=True)]
    if name == "completion":
        return [(text,) for text in decoded]
    # A chat template adds to the messages: of the logged prompts, the longest whose texts are all in the row's.
    longest = sorted({*logged}, key=lambda texts: -sum(map(len, texts)))
    return [next((each for each in longest if all(text.strip() in row for text in each)), None) for row in decoded]


def _contents(value: Any) -> tuple[str, ...]:
    """The texts of a logged prompt or completion: its own, or its messages'."""
    return (value,) if isinstance(value, str) else tuple(_content(message.get("content")) for message in value)


def _total(weights: dict[str, float], rewards: dict[str, float | None]) -> float | None:
    known = [weight * reward for name, weight in weights.items() if (reward := rewards[name]) is not None]
    return sum(known) if known else None


def _text(value: Any) -> str:
    """A text, or the messages of a conversation as lines."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message.get('role', '')}: {_content(message.get('content'))}" for message in value)


def _content(content: Any) -> str:
    """A message's text; a content of several parts, such as images, by the texts among them."""
    if isinstance(content, list):
        return " ".join(str(part.get("text", f"<{part.get('type')}>")) for part in content)
    return "" if content is None else str(content)
