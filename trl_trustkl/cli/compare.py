"""`trustkl compare`: the same task under several settings and seeds, and what the numbers say."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare import settings, task

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare.page import Report
    from ..compare.runner import Job, Outcome, Start

PARSER: dict[str, Any] = {
    "help": "run a task under several settings and seeds, and say what each of them changed",
    "description": (
        "Runs the same task under every setting with every seed, and writes comparison.html, .csv, .md and figures: score, "
        "distance to the reference, size of the updates, and what the numbers say. Finished runs are not made again: the same "
        "command goes on where it was stopped."
    ),
    "epilog": f"SETTINGS.yaml: {settings.__doc__}\n--task: module:function or file.py:function, called as\n    "
    f"function{task.SIGNATURE}\nwith the fields of the setting, "
    "`seed` and `max_steps` as config_changes.",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
}
WIDTH = 80
UNITS = (
    "Mean ± sample standard deviation over the seeds (one seed has none). KL to the reference in nats per "
    "response; largest KL of one update, limit ({limit}) and the reference's log-likelihood in nats per token."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.description = textwrap.fill(str(parser.description), WIDTH)
    parser.add_argument(
        "settings", nargs="?", metavar="SETTINGS.yaml", help="what to compare (default: anchor × clip, each on and off)"
    )
    parser.add_argument("--output-dir", default="runs/compare", help="where everything goes (default: %(default)s)")
    parser.add_argument("--updates", type=int, help=f"updates of a run (default: the file's, or {settings.UPDATES})")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of each setting (default: the file's, or 42)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--last", type=int, help="updates that final figures are means over (default: a quarter)")
    parser.add_argument(
        "--limit", type=float, default=settings.LIMIT,
        help="count updates whose KL to the policy before them exceeds this, in nats per token (default: %(default)s, what "
        "a clip range of 0.2 would mean if ratios stayed in it)",
    )  # fmt: skip
    parser.add_argument("--task", default=task.SENTIMENT, help="what to train (default: the demo's task)")
    parser.add_argument("--overwrite", action="store_true", help="replace runs that were made under other settings")


def run(options: argparse.Namespace, start: Start | None = None) -> int:
    """`start` begins the process of a run; by default a fresh interpreter."""
    from ..report import MissingPackageError

    try:
        from rich.console import Console

        from ..compare import page  # noqa: F401 -- hours before it is needed
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"A comparison needs the package {error.name}, which is not installed. Fix: pip install 'trl-trustkl[demo]'."
        ) from error
    from ..compare.runner import jobs, start_process, unfinished
    from ..report.text import count

    comparison, name = prepare(options)
    folder = Path(options.output_dir)
    planned = jobs(comparison, folder, name)
    left = unfinished(planned, overwrite=options.overwrite)
    console = Console(highlight=False, markup=False, emoji=False)
    done = len(planned) - len(left)
    _say(
        console,
        f"{count(len(comparison.settings), 'setting')} × {count(len(comparison.seeds), 'seed')}, "
        f"{count(comparison.updates, 'update')} each, in "
        f"{folder}{f'; {done} of {len(planned)} runs are finished' if done else ''}",
    )
    try:
        outcomes = make(left, len(planned), comparison.updates, options.processes, console, start or start_process)
    except KeyboardInterrupt:
        _say(console, "Stopped. Finished runs are kept; the same command goes on from here.")
        return 130
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if report := conclude(options, comparison, name, planned, failed):
        show(console, report, folder)
    for outcome in failed:
        _say(console, f"Failed: {_named(outcome.job)}: {outcome.error}")
        _say(console, f"        log: {outcome.job.folder / 'run.log'}")
    return 1 if failed else 0


def prepare(options: argparse.Namespace) -> tuple[settings.Comparison, str]:
    """What is compared and the task's name, everything checked before anything runs."""
    from ..demo.task import quieten, sentiment_config
    from ..errors import out_of_range

    quieten()
    for field, value in (("--processes", options.processes), ("--last", options.last)):
        if value is not None and value < 1:
            raise out_of_range(field, value, "a whole number >= 1")
    if not (math.isfinite(options.limit) and options.limit > 0):
        raise out_of_range("--limit", options.limit, "a positive number of nats per token")
    comparison = settings.read(options.settings, updates=options.updates, seeds=options.seeds)
    if options.last is not None and options.last > comparison.updates:
        raise out_of_range("--last", options.last, f"at most the {comparison.updates} updates of a run")
    name = task.resolve(options.task)
    task.load(name)
    return settings.validate(comparison, sentiment_config if name == task.SENTIMENT else None), name


def make(
    left: Sequence[Job], total: int, updates: int, processes: int, console: Console, start: Start
) -> list[Outcome]:
    """Run what is left, with progress."""
    from ..compare.runner import Runner

    if not left:
        return []
    with Live(console, total, total - len(left), updates) as live, Runner(processes, live, start) as runner:
        return runner.run(left)


class Live:
    """A line for each run that begins or ends; on a terminal also a bar over the updates of all runs, with the time left."""

    def __init__(self, console: Console, total: int, finished: int, updates: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeRemaining

        self.console, self.total, self.number, self.before = console, total, finished, finished * updates
        self.bar = Progress(
            TextColumn("updates"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemaining(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Updates take seconds: the speed is that of the last ten minutes.
            speed_estimate_period=600.0,
        )
        self.all = self.bar.add_task("updates", total=total * updates, completed=self.before)

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def started(self, job: Job) -> None:
        _say(self.console, f"begins    {_named(job)}")

    def ended(self, outcome: Outcome) -> None:
        self.number += 1
        how = "finished" if outcome.error is None else "FAILED  "
        _say(
            self.console, f"{how}  {_named(outcome.job)}: {outcome.seconds:.0f} s ({self.number} of {self.total} runs)"
        )

    def progress(self, updates: int) -> None:
        self.bar.update(self.all, completed=self.before + updates)


def conclude(
    options: argparse.Namespace,
    comparison: settings.Comparison,
    name: str,
    planned: Sequence[Job],
    failed: Sequence[Outcome],
) -> Report | None:
    """The report of every finished run, written into the folder; None where none is finished."""
    from ..compare.conclusions import conclude as in_words
    from ..compare.metrics import last_updates, result
    from ..compare.page import Report, save
    from ..report import read_run

    missing = {outcome.job.folder for outcome in failed}
    last = options.last or last_updates(comparison.updates)
    results, notes = [], []
    for setting, config in comparison.settings.items():
        runs = {
            job.seed: read_run(job.folder) for job in planned if job.setting == setting and job.folder not in missing
        }  # fmt: skip
        notes += [f"{setting}, seed {seed}: {note}" for seed, run in runs.items() for note in run.notes]
        if runs:
            results.append(result(setting, config, runs, last=last, limit=options.limit))
    if not results:
        return None
    notes += [f"{_named(outcome.job)} failed: {outcome.error}" for outcome in failed]
    report = Report(results, in_words(results, last=last), name, comparison.updates, last, options.limit, notes)
    save(report, Path(options.output_dir))
    return report


# -- the terminal ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "score": "score",
    "kl": "KL to\nref.",
    "update_kl": "update\nKL",
    "over_limit": "over\nlimit",
    "ratio": "largest\nratio",
    "ref_logp": "ref.\nlogp",
    "distinct_2": "dist.\n2",
}


def show(console: Console, report: Report, folder: Path) -> None:
    """Table, a completion of each setting, paragraph and files, within 80 columns."""
    from ..compare import page, tables
    from ..report.text import number

    console.print()
    console.print(summary_table(report))
    _say(console, _filled(UNITS.format(limit=number(report.limit))))
    console.print()
    for result in report.results:
        for kept in tables.samples(result, 1):
            _say(console, _filled(f"{result.name}: {tables.one_line(kept.completion, 140)}", "  "))
    console.print()
    _say(console, _filled(report.paragraph))
    console.print()
    for title, name in (("Page:", page.PAGE_FILE), ("Runs:", page.CSV_FILE), ("Table:", page.MARKDOWN_FILE)):
        _say(console, f"{title:9}{folder / name}")
    _say(console, f"{'Figures:':9}{folder / 'figures'}")


def summary_table(report: Report) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ..compare.tables import cell
    from ..report.text import visible

    spread = any(len(result.rows) > 1 for result in report.results)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", width=None)
    shown.add_column("\nsetting", max_width=16, overflow="fold")
    for title in COLUMNS.values():
        shown.add_column(title if "\n" in title else f"\n{title}", justify="right", overflow="fold")
    for result in report.results:
        cells = (cell(result, metric) for metric in COLUMNS)
        shown.add_row(Text(visible(result.name)), *(f"{mean}\n± {sd}" if spread else mean for mean, sd in cells))
    return shown


def _named(job: Job) -> str:
    return f"{job.setting}, seed {job.seed}"


def _say(console: Console, text: str) -> None:
    """A line of our own, in which nothing acts and nothing is wrapped: a path is to be copied."""
    from ..report.text import visible

    console.print(visible(text), soft_wrap=True)
    sys.stdout.flush()


def _filled(text: str, indent: str = "") -> str:
    from ..report.text import visible

    return textwrap.fill(visible(text), WIDTH, subsequent_indent=indent)
