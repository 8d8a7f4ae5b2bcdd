"""What a TrustRegionCallback does when the model is saved: the limits hold before, and its state is in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class TrustRegionState(TrainerCallback, ExportableState):
    """Holds the state of a `TrustRegionCallback` in checkpoints. A `TrustRegionCallback` adds it to its trainer.

    It is a separate callback, because transformers may rebuild such callbacks from the checkpoint, and a checkpoint cannot
    hold the trainer that a `TrustRegionCallback` needs.
    """

    def __init__(self) -> None:
        self.lr_factor = 1.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"lr_factor": self.lr_factor}}


def state_of(callbacks: Iterable[Any]) -> TrustRegionState | None:
    """The TrustRegionState among the callbacks, or None."""
    return next((each for each in callbacks if isinstance(each, TrustRegionState)), None)


class HeldBeforeSaving(Protocol):
    """The methods of a `TrustRegionCallback` that have to be called after those of all other callbacks."""

    trainer: Any

    def leave(self) -> None: ...

    def after_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None: ...

    def before_save(self, args: TrainingArguments, control: TrainerControl) -> None: ...


class BeforeSave(TrainerCallback):
    """The last callback of the run, so that it sees whether any other requested a save or the end.

    If its `TrustRegionCallback` was removed from the trainer, that one leaves the run.
    """

    def __init__(self, callback: HeldBeforeSaving) -> None:
        self._callback = callback

    @contextmanager
    def added(self) -> Iterator[None]:
        """Adds it to the trainer. It is removed with a new list, as the handler may be iterating over the current one."""
        handler = self._callback.trainer.callback_handler
        handler.add_callback(self)
        try:
            yield
        finally:
            handler.callbacks = [each for each in handler.callbacks if each is not self]

    def _added(self) -> bool:
        if self._callback in self._callback.trainer.callback_handler.callbacks:
            return True
        self._callback.leave()
        return False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._added()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._added():
            self._callback.after_step(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._added():
            self._callback.after_step(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._added():
            self._callback.before_save(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._added():
            self._callback.before_save(args, control)


def may_save(args: TrainingArguments, control: TrainerControl) -> bool:
    """Whether the model may be saved before the next step."""
    return control.should_save or (control.should_evaluate and args.save_strategy == "best")
