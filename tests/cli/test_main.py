"""`python -m trl_trustkl.cli`."""

from __future__ import annotations

import runpy
import sys

import pytest

import trl_trustkl


def test_the_module_runs_the_command_line_and_exits_with_its_status(monkeypatch, capsys, tmp_path):
    for arguments, status in ((["--version"], 0), (["report", str(tmp_path)], 1)):
        monkeypatch.setattr(sys, "argv", ["trustkl", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("trl_trustkl.cli", run_name="__main__")
        assert end.value.code == status
    out, err = capsys.readouterr()
    assert out.strip() == trl_trustkl.__version__ and "no records at" in err
