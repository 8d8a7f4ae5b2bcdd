"""Usage errors of all commands: what they say, in at most three lines of 80 columns where the choices are few."""

from __future__ import annotations

import pytest

from tests.cli.training import run_main
from trl_trustkl.cli import demo, main
from trl_trustkl.cli.parser import Parser


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmeo"],
         "trustkl: `command` got 'dmeo'; it must be one of 'compare', 'demo', 'report', 'train'. Did you mean 'demo'?"),
        (["demo", "--trainer=grop"],
         "trustkl demo: `trainer` got 'grop'; it must be one of 'grpo', 'ppo'. Did you mean 'grpo'?"),
        (["demo", "--updates=x"], "trustkl demo: argument --updates: invalid int value: 'x'"),
        (["report"], "trustkl report: the following arguments are required: RUN"),
        (["compare", "--seed"], "trustkl compare: argument --seeds: expected at least one argument"),
    ],
)  # fmt: skip
def test_an_error_of_usage_is_one_line_and_the_command_for_help(capsys, arguments, message):
    command = message.partition(":")[0]
    assert said(capsys, *arguments) == f"{message}\nAll options: {command} --help\n"


def test_a_misspelt_value_of_train_is_answered_in_three_lines(capsys):
    assert run_main("--clip_rule=pppo") == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3
    assert run_main("--optim=adamw_torh") == 2
    error = capsys.readouterr().err
    assert "`optim` got 'adamw_torh'; the nearest of its " in error and " values are adamw_torch, " in error
    assert len(error) < 240


def test_all_required_options_that_are_missing_are_named_at_once(capsys):
    """Before those that transformers rejects: here, the batch."""
    assert run_main("--per_device_train_batch_size=-1") == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "trustkl train: required options are missing:"
    assert [line.split(":")[0].strip() for line in rest] == ["--model_name_or_path", "--dataset_name", "--reward_funcs"]


def test_values_among_the_choices_and_of_options_without_choices_are_taken():
    parser = Parser()
    parser.add_argument("--way", choices=("up", "down"))
    parser.add_argument("--name")
    assert vars(parser.parse_args(["--way=up", "--name=pu"])) == {"way": "up", "name": "pu"}


def test_ctrl_c_has_its_status_without_a_traceback(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "trustkl demo: stopped.\n"
