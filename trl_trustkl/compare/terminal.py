"""A comparison in the terminal: the progress of its runs, then the summary, within 80 columns."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..callbacks.table import WIDTH, updates_bar
from ..report import FIGURES_FOLDER
from ..report.text import count, number, one_line, shortened, visible
from . import page, tables
from .runner import LOG_FILE, Job, Outcome, Runner, Start
from .settings import Comparison

UNITS = (
    "Mean ± sample standard deviation over the seeds (one seed has none). KL to the reference in nats per "
    "response; largest KL of one update, limit ({limit}) and the reference's log-likelihood in nats per token."
)
COLUMNS = {
    "score": "score",
    "kl": "KL to\nref.",
    "update_kl": "update\nKL",
    "over_limit": "over\nlimit",
    "ratio": "largest\nratio",
    "ref_logp": "ref.\nlogp",
    "distinct_2": "dist.\n2",
}


def make(
    console: Console, comparison: Comparison, planned: Sequence[Job], left: Sequence[Job], processes: int, start: Start
) -> list[Outcome]:
    """Run the jobs that are `left` of the planned ones, and show the progress."""
    if not left:
        return []
    live = Live(console, len(planned), len(planned) - len(left), comparison.updates)
    with live.bar, Runner(processes, live, start) as runner:
        return runner.run(left)


class Live:
    """Prints a line when a run begins or ends; in a terminal, `bar` shows the updates of all runs and the time left."""

    def __init__(self, console: Console, total: int, finished: int, updates: int) -> None:
        self.console, self.total, self.number, self.before = console, total, finished, finished * updates
        self.bar = updates_bar(console)
        self.all = self.bar.add_task("updates", total=total * updates, completed=self.before)

    def started(self, job: Job) -> None:
        say(self.console, f"begins    {job.title}")

    def ended(self, outcome: Outcome) -> None:
        self.number += 1
        how = "finished" if outcome.error is None else "FAILED  "
        runs = f"{self.number} of {self.total} runs"
        say(self.console, f"{how}  {outcome.job.title}: {outcome.seconds:.0f} s ({runs})")

    def progress(self, updates: int) -> None:
        self.bar.update(self.all, completed=self.before + updates)


def show_plan(console: Console, comparison: Comparison, folder: Path, planned: int, finished: int) -> None:
    """What will be run, and how many of the planned runs are already finished."""
    sizes = f"{count(len(comparison.settings), 'setting')} × {count(len(comparison.seeds), 'seed')}"
    already = f"; {finished} of {planned} runs are finished" if finished else ""
    say(console, f"{sizes}, {count(comparison.updates, 'update')} each, in {folder}{already}")


def show(console: Console, report: page.Report, folder: Path) -> None:
    """Print the table, a completion of each setting, the paragraph and the files."""
    console.print()
    console.print(summary_table(report))
    say(console, _filled(UNITS.format(limit=number(report.limit))))
    console.print()
    for result in report.results:
        for kept in tables.samples(result, 1):
            say(console, _filled(f"{result.name}: {one_line(shortened(kept.completion, 140))}", "  "))
    console.print()
    say(console, _filled(report.paragraph))
    console.print()
    names = (page.PAGE_FILE, page.CSV_FILE, page.MARKDOWN_FILE, FIGURES_FOLDER)
    for title, name in zip(("Page:", "Runs:", "Table:", "Figures:"), names, strict=True):
        say(console, f"{title:9}{folder / name}")


def summary_table(report: page.Report) -> Table:
    spread = any(len(result.rows) > 1 for result in report.results)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", width=None)
    shown.add_column("\nsetting", max_width=16, overflow="fold")
    for title in COLUMNS.values():
        shown.add_column(title if "\n" in title else f"\n{title}", justify="right", overflow="fold")
    for result in report.results:
        cells = (tables.cell(result, metric) for metric in COLUMNS)
        shown.add_row(Text(visible(result.name)), *(f"{mean}\n± {sd}" if spread else mean for mean, sd in cells))
    return shown


def show_failed(console: Console, failed: Sequence[Outcome]) -> None:
    """Print why each failed run ended, and where its output is."""
    for outcome in failed:
        say(console, f"Failed: {outcome.job.title}: {outcome.error}")
        say(console, f"        log: {outcome.job.folder / LOG_FILE}")


def say(console: Console, text: str) -> None:
    """Print a line without active characters, and without wrapping it, so that a path can be copied."""
    console.print(visible(text), soft_wrap=True)
    sys.stdout.flush()


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(visible(text), WIDTH, subsequent_indent=indent)
