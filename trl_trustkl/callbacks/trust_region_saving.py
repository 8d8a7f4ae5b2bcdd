"""What a TrustRegionCallback does when the model is saved: the limits hold before, and its state is in the checkpoint."""

from __future__ import annotations

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


class HeldBeforeSaving(Protocol):
    """The methods of a `TrustRegionCallback` that have to be called after those of all other callbacks."""

    def after_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None: ...

    def before_save(self, args: TrainingArguments, control: TrainerControl) -> None: ...


class BeforeSave(TrainerCallback):
    """The last callback of the run, so that it sees whether any other requested a save or the end."""

    def __init__(self, callback: HeldBeforeSaving) -> None:
        self._callback = callback

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._callback.after_step(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._callback.after_step(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._callback.before_save(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._callback.before_save(args, control)


def may_save(args: TrainingArguments, control: TrainerControl) -> bool:
    """Whether the model may be saved before the next step."""
    return control.should_save or (control.should_evaluate and args.save_strategy == "best")
