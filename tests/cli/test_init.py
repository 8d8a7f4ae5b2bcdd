"""The command line: options and exit statuses of all commands."""

from __future__ import annotations

import pytest

from trl_trustkl.cli import main


def test_options_of_other_commands_are_still_checked(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "somewhere", "--wide"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --wide" in capsys.readouterr().err


def test_the_exit_statuses_are_documented(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for status in (
        "0 for",
        "1 for an error of the run",
        "2 for a usage error",
        "130 after Ctrl-C",
        "143 after SIGTERM",
    ):
        assert status in said


def test_usage_errors_and_errors_of_a_run_have_their_own_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["dmeo"])
    assert usage.value.code == 2
    assert main(["report", str(tmp_path)]) == 1
    assert main(["demo", "--trainer=grpo", "--kl-target=1"]) == 2
    assert "trustkl report: no records at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["demo", "--help"])
    assert asked.value.code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--output-dir"],
        ["compare", "--output-dir"],
        ["train", "--model_name_or_path=m", "--dataset_name=d", "--reward_funcs=r.f", "--use_cpu", "--output_dir"],
    ],
)
def test_an_output_folder_that_cannot_be_created_is_a_usage_error(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "`output_dir` got" in capsys.readouterr().err
