"""Reports from records: summary, findings, figures, and one self-contained page. They need no model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError, MissingPackageError, require_packages, shown
from ..files import write_atomically
from ..records import BOUNDS_FILE, COMPLETIONS_FILE, SETTINGS_FILE
from .schema import Run, read_run

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"


def render_report(
    run_dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of one or several runs, and the figures of each into its folder `figures`; returns the page's path.

    run_dirs: a run's folder (its output_dir), its `bounds.jsonl`, or several of them for a page with all. output: path of the
    page; by default `report.html` in the run's folder, or in the current folder for several runs. Raises DataError for
    records that cannot be read, and for an `output` that is a file of a run.
    """
    given = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    return write_report([read_run(each) for each in given], output)


def write_report(runs: list[Run], output: str | os.PathLike[str] | None = None) -> Path:
    """As `render_report`, for runs that have been read."""
    require_packages("A report", "jinja2", "matplotlib")
    import numpy as np

    from . import figures, html

    if not runs:
        raise ValueError("write_report got no runs; give at least one.")
    if output is not None and Path(output).name in ("", BOUNDS_FILE, COMPLETIONS_FILE, SETTINGS_FILE):
        raise DataError(f"`output` got {shown(str(output))}; it must be the path of a page, such as report.html.")
    target = Path(output) if output is not None else (runs[0].folder if len(runs) == 1 else Path()) / REPORT_FILE
    sections = []
    with np.errstate(all="ignore"):  # numbers near the largest float overflow when they are averaged
        for run in runs:
            drawn = figures.draw(run.records)
            figures.write(drawn, run.folder / FIGURES_FOLDER)
            sections.append(html.section(run, drawn))
        content = html.page(sections)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)  # the page may be open while the run renders it again
    return target


__all__ = ["MissingPackageError", "Run", "read_run", "render_report", "write_report"]
