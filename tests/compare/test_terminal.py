"""A comparison in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_trustkl.compare import page, terminal


def test_nothing_of_a_completion_acts_in_the_terminal(
    attacked: tuple[page.Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    terminal.show(Console(highlight=False, markup=False, emoji=False, width=80), *attacked)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e\u2066\x00\ud800") and "\\x1b[2J" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(attacked[1]) not in line)
