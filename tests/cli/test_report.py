"""`trustkl report`: its output and its errors."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from tests.example_runs import run_folder
from trl_trustkl.cli import report as command
from trl_trustkl.errors import DataError


def invoke(*arguments: str) -> int:
    parser = ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    return options.run(options)


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run\x1b[31m", score=float("nan"))
    assert invoke(str(folder)) == 0
    out, err = capsys.readouterr()
    assert "report.html" in out and "figures" in out and "not finite" in err
    assert "\x1b" not in out + err


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the report cannot be written"):
        invoke(str(run_folder(tmp_path / "run")), "--output", str(tmp_path / "file" / "page.html"))
