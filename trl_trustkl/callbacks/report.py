"""BoundReportCallback: the records of a run, written as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import records
from ..types import BoundRecord


class BoundReportCallback(TrainerCallback):
    """Writes `bounds.jsonl`, a line for every update, and `completions.jsonl` into the run's folder.

    Each line reaches the operating system before the next update begins: a killed run keeps every finished update. Files
    of an earlier run in the same folder are moved aside, never appended to; a resumed run drops the lines after its
    checkpoint and goes on from there. The trainer adds this callback by itself.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (records.BOUNDS_FILE, records.COMPLETIONS_FILE):
            if state.global_step:
                records.cut(folder / name, after=state.global_step)
            else:
                records.move_aside(folder / name)

    def on_record(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: BoundRecord,
        completions: list[dict[str, Any]],
    ) -> None:
        """Called by the trainer on its first process, after each update and before `on_step_end`."""
        folder = Path(args.output_dir)
        records.append_line(folder / records.BOUNDS_FILE, records.as_dict(record))
        for row in completions:
            records.append_line(folder / records.COMPLETIONS_FILE, row)
