"""The state of a run that a checkpoint holds besides weights, optimizer and random states."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from .resume_compatibility import as_json

FORMAT = 1
"""The format of the file that holds a RunState."""


class Stateful(Protocol):
    """A part of a run's state. `load_state_dict` takes what `state_dict` returned, which may have been stored in a file."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class OnlineTrainerState(TrainerState):
    """TrainerState with the number of responses sampled so far."""

    episode: int = 0


class TransformersState:
    """transformers' state of a run, in the format of its `trainer_state.json`; loaded in place.

    `exportable` returns the callbacks whose state is included.
    """

    def __init__(self, state: OnlineTrainerState, exportable: Callable[[], list[ExportableState]]) -> None:
        self._state = state
        self._exportable = exportable

    def state_dict(self) -> dict[str, Any]:
        self._state.stateful_callbacks = OnlineTrainerState(stateful_callbacks=self._exportable()).stateful_callbacks
        return dict(sorted(dataclasses.asdict(self._state).items()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self._state).update(vars(OnlineTrainerState(**state)))
        for name, stored in self._state.stateful_callbacks.items():
            exportable = [each for each in self._exportable() if isinstance(each, TrainerCallback)]
            callbacks = [each for each in exportable if type(each).__name__ == name]
            for callback, data in zip(callbacks, stored if isinstance(stored, list) else [stored], strict=False):
                for attribute, value in data.get("attributes", {}).items():
                    setattr(callback, attribute, value)


class Rejections(NamedTuple):
    """How many updates were rejected: in the entire run, and in a row up to now."""

    total: int = 0
    in_a_row: int = 0

    def after(self, rejected: bool) -> Rejections:
        """The counts after one more update."""
        return Rejections(self.total + rejected, self.in_a_row + 1 if rejected else 0)


class Progress:
    """Counts and losses of a run so far, and the metrics of the updates since the last log."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clear everything for a new run."""
        self.rejections = Rejections()
        self.logged_step = 0
        self.last_loss = 0.0
        self._metrics: dict[str, list[Any]] = defaultdict(list)

    def add(self, metrics: dict[str, Any], *, loss: float, rejected: bool) -> None:
        """Add an update that has ended."""
        self.last_loss = loss
        self.rejections = self.rejections.after(rejected)
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def flush(self, step: int) -> dict[str, Any]:
        """Return the mean of each number since the last log, and the latest value of everything else; then clear them."""
        logs: dict[str, Any] = {}
        for name, values in self._metrics.items():
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            logs[name] = sum(numbers) / len(numbers) if numbers else values[-1]
        self._metrics.clear()
        self.logged_step = step
        return logs

    def state_dict(self) -> dict[str, Any]:
        return {
            "refusals": list(self.rejections),
            "metrics": as_json(self._metrics),
            "logged_step": self.logged_step,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rejections = Rejections(*state["refusals"])
        self._metrics = defaultdict(list, state["metrics"])
        self.logged_step, self.last_loss = state["logged_step"], state["last_loss"]


class RunState:
    """Several parts in one dict. Each part loads its keys from all of them."""

    def __init__(self, pieces: Iterable[Stateful]) -> None:
        self._pieces = list(pieces)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"format": FORMAT}
        for piece in self._pieces:
            state |= piece.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for piece in self._pieces:
            piece.load_state_dict(state)
