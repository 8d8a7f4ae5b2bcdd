"""argparse's parser, with usage errors of two lines."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from ..errors import shown, unknown_name

LISTED = 16
"""Choices at most that help texts and messages list."""


class Formatter(argparse.HelpFormatter):
    """The value of an option once, after its names, as from Python 3.13 on."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the command and its --help, and do not print the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"formatter_class": Formatter} | kwargs))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nAll options: {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        message = str(unknown_name(action.dest, value, names))
        if len(names) > LISTED and (near := difflib.get_close_matches(str(value), names, n=5)):
            message = (
                f"`{action.dest}` got {shown(value)}; the nearest of its {len(names)} values are {', '.join(near)}."
            )
        raise argparse.ArgumentError(None, message)
