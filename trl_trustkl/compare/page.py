"""The files of a comparison: comparison.html, .csv, .md and figures.

Completions and settings are untrusted text; the report's template environment escapes every expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_atomically
from ..report import FIGURES_FOLDER, read_run
from ..report.figures import write
from ..report.html import environment
from ..report.text import count
from . import figures, tables
from .conclusions import conclude
from .metrics import Result, last_updates, latest, result
from .runner import Job, Outcome
from .settings import Comparison

PAGE_FILE, CSV_FILE, MARKDOWN_FILE = "comparison.html", "comparison.csv", "comparison.md"
SHOWN = 3  # completions of a setting


class Report(NamedTuple):
    """The results of a comparison. `last`: how many updates are "the last"; `notes`: what is missing."""

    results: list[Result]
    paragraph: str
    task: str
    updates: int
    last: int
    limit: float
    notes: list[str]


def collect(
    comparison: Comparison,
    task: str,
    planned: Sequence[Job],
    failed: Sequence[Outcome],
    *,
    last: int | None,
    limit: float,
) -> Report | None:
    """The report of the finished runs; None if there are none. `last`: by default a quarter of the updates."""
    missing = {outcome.job.folder for outcome in failed}
    last = last or last_updates(comparison.updates)
    results, notes = [], []
    for setting, config in comparison.settings.items():
        of_setting = [job for job in planned if job.setting == setting and job.folder not in missing]
        runs = {job.seed: read_run(job.folder) for job in of_setting}
        notes += [f"{setting}, seed {seed}: {note}" for seed, run in runs.items() for note in run.notes]
        if runs:
            results.append(result(setting, config, runs, last=last, limit=limit))
    if not results:
        return None
    notes += [f"{outcome.job.title} failed: {outcome.error}" for outcome in failed]
    return Report(results, conclude(results, last=last), task, comparison.updates, last, limit, notes)


@np.errstate(all="ignore")
def save(report: Report, folder: Path) -> None:
    """Write all files, each atomically."""
    results, last = report.results, latest(report.last)
    drawn = figures.draw(results)
    write(drawn, folder / FIGURES_FOLDER)
    seeds = sorted({seed for each in results for seed in each.rows})
    page = environment("trl_trustkl.compare").get_template("comparison.html")
    content = page.render(
        report=report,
        title=folder.resolve().name,
        subtitle=f"{count(len(results), 'setting')}, {count(report.updates, 'update')} each, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        table=tables.table(results, "\n± "),
        figures=drawn,
        samples=[(each.name, tables.samples(each, SHOWN)) for each in results],
        settings=tables.configurations(results),
        explained=tables.explained(last, report.limit),
    )
    write_atomically(folder / PAGE_FILE, content)
    write_atomically(folder / CSV_FILE, tables.as_csv(results))
    write_atomically(folder / MARKDOWN_FILE, tables.as_markdown(results, report.paragraph, last, report.limit))
