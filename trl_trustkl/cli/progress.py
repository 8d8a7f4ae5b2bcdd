"""What `trustkl train` shows of a run: a line for each update, and transformers' progress bar below."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..callbacks.bound_report import report_of

EVALUATED = ("score", "reward", "kl", "loss")


class Evaluations(TrainerCallback):
    """Prints the main metrics of an evaluation, of all those that transformers would print as a dict."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        found = [f"{name} {logs[f'eval_{name}']:.4g}" for name in EVALUATED if f"eval_{name}" in logs]
        if found and state.is_world_process_zero:
            tqdm.write(f"{state.global_step:4}  evaluation: {', '.join(found)}")


class Progress(Evaluations, ProgressCallback):
    """transformers' progress bar with these lines above."""


def show_updates(trainer: Any) -> None:
    """Show the table of updates, in place of all metrics of an update as a dict."""
    if (report := report_of(trainer.callback_handler.callbacks)) is not None:
        report.table = True
    for each in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(each)
    trainer.add_callback(Evaluations() if trainer.args.disable_tqdm else Progress())
