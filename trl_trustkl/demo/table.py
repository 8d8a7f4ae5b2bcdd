"""The demo's table of updates, with a progress bar and the time left below it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from transformers import TrainingArguments

from ..callbacks import BoundReportCallback
from ..callbacks.table import HEADER, line, updates_bar
from ..records import BoundRecord


class LiveReport(BoundReportCallback):
    """A BoundReportCallback that also shows a table of the updates, and below it a progress bar while `progress` is entered
    as a context."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(report=True)
        self.console = console
        self.records: list[BoundRecord] = []
        self.progress = updates_bar(console)
        self.task = self.progress.add_task("updates", total=total)

    def _begin_table(self, args: TrainingArguments) -> None:
        self.console.print(HEADER, style="bold")

    def show(self, record: BoundRecord) -> None:
        self.records.append(record)
        self.console.print(Text(line(record), style="" if record.refused is None else "yellow"))
        self.progress.advance(self.task)
