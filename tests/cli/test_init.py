"""The exit statuses of the command line."""

from __future__ import annotations

import pytest

from trl_trustkl.cli import main


def test_usage_errors_and_errors_of_a_run_have_their_own_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["dmeo"])
    assert usage.value.code == 2
    assert main(["report", str(tmp_path)]) == 1
    assert "no records at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["demo", "--help"])
    assert asked.value.code == 0
