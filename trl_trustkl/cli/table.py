"""One line for each update, with a progress bar and the time left below."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import BoundRecord

HEADER = "   #  score    KL target   coef  anchor  clip  KL/token max ratio  bound by"


class UpdateTable(TrainerCallback):
    """Prints the records of a run as they come; fits a terminal of 80 columns."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.records: list[BoundRecord] = []
        self.progress = Progress(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("update", total=total)

    def __enter__(self) -> UpdateTable:
        self.console.print(HEADER, style="bold")
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def on_record(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: BoundRecord, **_: Any
    ) -> None:
        self.records.append(record)
        self.console.print(line(record), style="yellow" if record.refused else None)
        self.progress.advance(self.task)


def line(record: BoundRecord) -> str:
    """score · exact KL to the reference and its target (nats per response) · coefficient · anchor's share · gated share ·
    KL(π_old‖π) after the update (nats per token) · largest ratio · what bound."""
    score = "   –  " if record.score is None else f"{record.score:+.3f}"
    target = "–" if record.anchor.target is None else f"{record.anchor.target:.1f}"
    share = "–" if record.anchor.share is None else f"{record.anchor.share:.0%}"
    ratio = f"{record.trust.max_ratio:.1f}" if record.trust.max_ratio < 1e5 else f"{record.trust.max_ratio:.0e}"
    return (
        f"{record.update:4}  {score} {record.anchor.kl_exact:5.2f}  {target:>5} {record.anchor.coef:6.3f}  {share:>6} "
        f"{record.trust.gated:5.0%}  {record.trust.kl:8.4f} {ratio:>9}  {record.refused or record.binding}"
    )
