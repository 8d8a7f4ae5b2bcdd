"""`trustkl report`: one page about what bounded the updates of a run, from its records."""

from __future__ import annotations

import argparse
import sys

HELP = "write report.html and figures from the records of one or several runs"
DESCRIPTION = (
    "Reads the records of one or several runs and writes one self-contained report.html: a summary of what bounded the "
    "updates, findings, each with a change of configuration, figures, and completions. The figures are also written to "
    "RUN/figures."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir, or its bounds.jsonl")
    parser.add_argument(
        "-o", "--output", help="path of the page (default: RUN/report.html, or ./report.html for several runs)"
    )


def run(options: argparse.Namespace) -> int:
    from ..errors import DataError
    from ..report import read_run, write_report
    from ..report.text import visible

    runs = [read_run(path) for path in options.runs]
    for each in runs:
        for note in each.notes:
            print(visible(f"trustkl: {each.folder}: {note}"), file=sys.stderr)
    try:
        page = write_report(runs, options.output)
    except OSError as error:
        raise DataError(f"the report cannot be written: {error}.") from None
    print(visible(f"Report:   {page}"))
    for each in runs:
        print(visible(f"Figures:  {each.folder / 'figures'}"))
    return 0
