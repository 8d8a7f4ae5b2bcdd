"""The comparison as tables: for a page, for Markdown, for a terminal, and every run as a line of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..report.schema import Completion
from ..report.series import mean
from ..report.tables import Table
from ..report.text import markdown, number, one_line, shortened, visible
from .metrics import METRICS, Result, shown, spread

MISSING = "–"


def cell(result: Result, metric: str) -> tuple[str, str]:
    """The mean over the seeds and the spread; "–" for one that is missing."""
    values = result.values(metric)
    return shown(metric, mean(values)), shown(metric, spread(values))


def table(results: Sequence[Result], between: str = " ± ") -> Table:
    """A row for each setting; `between` separates the mean and the spread of a cell."""
    head = [f"{title} ({unit})" if unit else title for title, unit, *_ in METRICS.values()]
    rows = [
        [result.name, str(len(result.rows)), *(between.join(cell(result, metric)) for metric in METRICS)]
        for result in results
    ]
    return Table(["setting", "seeds", *head], rows)


def explained(last: str, limit: float) -> dict[str, str]:
    """What each column means; `last`: such as "last 5 updates"."""
    return {
        metric.title: metric.how.format(last=last, limit=number(limit)) + (f"; {metric.unit}" if metric.unit else "")
        for metric in METRICS.values()
    }


def configurations(results: Sequence[Result]) -> Table:
    """A row for each field that any setting sets, a column for each setting."""
    fields = dict.fromkeys(field for result in results for field in result.config)
    rows = [
        [field, *(shortened(repr(each.config[field]), 120) if field in each.config else MISSING for each in results)]
        for field in fields
    ]
    return Table(["field", *(result.name for result in results)], rows)


def samples(result: Result, count: int) -> list[Completion]:
    """The first completions of the last update that recorded any, in the first run that did."""
    for run in result.runs.values():
        if run.completions:
            end = max(row.update for row in run.completions)
            return [row for row in run.completions if row.update == end][:count]
    return []


def as_csv(results: Sequence[Result]) -> str:
    """A line for each run, with every metric unrounded; an empty field for a missing number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "seed", *METRICS])
    for result in results:
        for seed, row in result.rows.items():
            numbers = [row[metric] if row[metric] == row[metric] else "" for metric in METRICS]
            writer.writerow([visible(result.name), seed, *numbers])
    return text.getvalue()


def as_markdown(results: Sequence[Result], paragraph: str, last: str, limit: float) -> str:
    """Paragraph, table with a completion of each setting, and what the columns mean."""
    head, rows = table(results)
    lines = [markdown(paragraph), ""]
    lines += [_row([*head, "a completion at the end"]), "|" + "---|" * (len(head) + 1)]
    for result, row in zip(results, rows, strict=True):
        sample = next((one_line(shortened(kept.completion, 200)) for kept in samples(result, 1)), MISSING)
        lines.append(_row([*row, sample]))
    lines += ["", "Mean ± sample standard deviation over the seeds (– with one seed).", ""]
    lines += [f"- {markdown(title)}: {markdown(how)}" for title, how in explained(last, limit).items()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"
