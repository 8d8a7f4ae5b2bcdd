"""The command line: `trustkl demo`, `trustkl train`, `trustkl report` and `trustkl compare`.

It has the arguments, their checks and the exit statuses; the other folders, all of which it may import, do the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import ConfigError, TrustKLError
from .parser import Parser

EPILOG = (
    "Exit status: 0 for success; 1 for an error of the run; 2 for a usage error (command line or configuration); 130 after "
    "Ctrl-C; 143 after SIGTERM."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, as EPILOG lists it."""
    parser = Parser(
        prog="trustkl",
        description="GRPO, RLOO and PPO with TRL, and a record of what bounds every update.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from . import compare, demo, report, train

    demo.add_arguments(commands.add_parser("demo", help=demo.HELP, description=demo.DESCRIPTION))
    train.add_arguments(commands.add_parser("train", help=train.HELP, add_help=False, allow_abbrev=False))
    report.add_arguments(commands.add_parser("report", help=report.HELP, description=report.DESCRIPTION))
    compare.add_arguments(commands.add_parser("compare", **compare.PARSER))
    options, rest = parser.parse_known_args(argv)
    options.rest = rest
    if rest and not getattr(options, "parses_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except TrustKLError as error:
        print(f"trustkl {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(f"trustkl {options.command}: stopped.", file=sys.stderr)
        return 130
