"""The command line: `trustkl demo`, `trustkl report` and `trustkl compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import TrustKLError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status is 0, 1 for an error of the run, 2 for one of usage, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="trustkl", description="PPO on TRL, with a record of what bounds every update."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from . import compare, demo, report

    demo.add_arguments(commands.add_parser("demo", help=demo.HELP, description=demo.DESCRIPTION))
    report.add_arguments(commands.add_parser("report", help=report.HELP, description=report.DESCRIPTION))
    compare.add_arguments(commands.add_parser("compare", **compare.PARSER))
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except TrustKLError as error:
        print(f"trustkl: {error}", file=sys.stderr)
        return 1
