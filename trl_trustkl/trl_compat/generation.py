"""What TRL's GRPO and RLOO trainers keep of a generation batch: its tokens, how long it is used, its metrics and completions.

The attributes read here are private to TRL. They are the same from TRL 1.12 to 1.16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..errors import ModelError
from ..types import MicroBatch
from .trl_trainers import GenerationTrainer

_NEEDED = ("_buffered_inputs", "_step", "_metrics", "_logs")


def generates(trainer: Any) -> bool:
    """Whether the trainer makes generation batches as GRPO and RLOO do."""
    args = getattr(trainer, "args", None)
    return all(hasattr(trainer, name) for name in _NEEDED) and hasattr(args, "steps_per_generation")


def passes_per_generation(trainer: GenerationTrainer) -> int:
    """Training passes (micro-batches) for which one generation batch is used: all of its micro-batches, `num_iterations`
    times."""
    return trainer.args.steps_per_generation * trainer.args.num_iterations


def steps_are_shared(trainer: GenerationTrainer) -> bool:
    """Whether an optimizer step may use two generation batches of which one is used by another step too."""
    generation, step = passes_per_generation(trainer), trainer.args.gradient_accumulation_steps
    return generation % step != 0 and step % generation != 0


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
    are those with a loss: a tool's output is masked out. ModelError for a batch with images."""
    found, first = [], 0
    for part in trainer._buffered_inputs or []:
        if "pixel_values" in part:
            raise ModelError(
                "the generation batch has images, with which this version of TrustRegionCallback cannot measure a divergence; "
                "train on prompts of text, or remove the callback."
            )
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
    """One row of a generation batch, with its weighted reward; None where no function gave one."""

    prompt: str
    completion: str
    score: float | None


def completions(trainer: GenerationTrainer) -> list[Completion]:
    """The rows that were generated last, of all processes."""
    logs, count = trainer._logs, trainer.args.generation_batch_size
    rewards = [list(logs["rewards"][name])[-count:] for name in trainer.reward_func_names]
    weights = trainer.reward_weights.tolist()
    rows = zip(list(logs["prompt"])[-count:], list(logs["completion"])[-count:], *rewards, strict=True)
    return [Completion(_text(prompt), _text(text), _total(weights, each)) for prompt, text, *each in rows]


def _total(weights: list[float], rewards: list[float]) -> float | None:
    known = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if not math.isnan(reward)]
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
