"""comparison.html, .csv, .md and figures: what a comparison leaves in its folder.

Completions and settings are untrusted text: they enter through the report's own template environment, which escapes every
expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_whole
from ..report import FIGURES_FOLDER
from ..report.figures import Drawn, write
from ..report.html import environment
from ..report.tables import LENGTH, Sample
from ..report.text import count, number, shortened
from . import figures, tables
from .metrics import Result, latest

PAGE_FILE, CSV_FILE, MARKDOWN_FILE = "comparison.html", "comparison.csv", "comparison.md"
SHOWN = 3  # completions of a setting


class Report(NamedTuple):
    """A comparison in words and numbers. `last`: the updates that "the last" are; `notes`: what is missing."""

    results: list[Result]
    paragraph: str
    task: str
    updates: int
    last: int
    limit: float
    notes: list[str]


class Side(NamedTuple):
    """A setting's completions."""

    name: str
    samples: list[Sample]


@np.errstate(all="ignore")
def save(report: Report, folder: Path) -> None:
    """Write everything; each file is whole or as it was."""
    drawn = figures.draw(report.results)
    write(drawn, folder / FIGURES_FOLDER)
    contents = {
        PAGE_FILE: page(report, drawn, folder.resolve().name),
        CSV_FILE: tables.as_csv(report.results),
        MARKDOWN_FILE: tables.as_markdown(report.results, report.paragraph, latest(report.last), report.limit),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)


def page(report: Report, drawn: Sequence[Drawn], title: str) -> str:
    template = environment("trl_trustkl.compare").get_template("comparison.html")
    return template.render(
        title=title,
        subtitle=subtitle(report),
        notes=report.notes,
        paragraph=report.paragraph,
        table=tables.table(report.results, "\n± "),
        figures=drawn,
        sides=[Side(result.name, _samples(result)) for result in report.results],
        task=report.task,
        settings=tables.configurations(report.results),
        explained=tables.explained(latest(report.last), report.limit),
    )


def subtitle(report: Report) -> str:
    """ "4 settings × 2 seeds, 20 updates each"."""
    seeds = sorted({seed for result in report.results for seed in result.rows})
    return (
        f"{count(len(report.results), 'setting')}, {count(report.updates, 'update')} each, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def _samples(result: Result) -> list[Sample]:
    return [
        Sample(
            shortened(row.prompt, LENGTH), shortened(row.completion, LENGTH), number(row.score), number(row.ref_logp)
        )
        for row in tables.samples(result, SHOWN)
    ]
