"""BoundReportCallback: a record for every update, and a report that never ends a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests import tiny
from tests.callbacks.terminal import Terminal
from tests.example_runs import record
from trl_trustkl import BoundReportCallback, load_records
from trl_trustkl.callbacks import bound_report as module
from trl_trustkl.callbacks import table
from trl_trustkl.callbacks.bound_report import with_report
from trl_trustkl.errors import ConfigError


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.fixture
def renders(monkeypatch) -> list[int]:
    """The number of records of each rendered report."""
    seen: list[int] = []

    def render(folder: Path) -> Path:
        seen.append(len(load_records(folder)))
        return folder / "report.html"

    monkeypatch.setattr(module, "render_report", render)
    return seen


@pytest.fixture
def said(monkeypatch) -> list[tuple[str, str]]:
    """What the callback logged: (level, text)."""
    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(module.logger, level, lambda text, level=level: lines.append((level, text)))
    return lines


def test_a_run_ends_with_its_report_and_figures(tmp_path):
    tiny.trainer(tmp_path, changes={"max_steps": 2}, callbacks=[BoundReportCallback()]).train()
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "figures").glob("*.svg"))


def test_the_report_is_rendered_every_so_many_updates_and_at_the_end(tmp_path, renders):
    tiny.trainer(tmp_path, changes={"max_steps": 5}, callbacks=[BoundReportCallback(report_every=2)]).train()
    assert renders == [2, 4, 5]


def test_a_run_that_is_stopped_early_has_its_report_too(tmp_path, renders):
    tiny.trainer(tmp_path, callbacks=[Stop(), BoundReportCallback()]).train()
    assert renders == [1]


def test_no_report_when_it_is_switched_off(tmp_path, renders):
    tiny.trainer(tmp_path, changes={"max_steps": 1}, callbacks=[BoundReportCallback(report=False)]).train()
    assert renders == [] and len(load_records(tmp_path)) == 1


def test_the_time_to_render_is_in_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "render_report", lambda folder: time.sleep(2))
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 2}, callbacks=[BoundReportCallback(report_every=1)])
    trainer.train()
    for row in load_records(tmp_path):
        phases = sum(seconds for name, seconds in row["seconds"].items() if name != "total")
        assert row["seconds"]["total"] - phases < 1.9


def test_a_failure_to_render_is_one_warning_and_does_not_end_the_run(tmp_path, monkeypatch, said):
    def fail(folder):
        raise OSError("disk \x1b[31mfull")

    monkeypatch.setattr(module, "render_report", fail)
    tiny.trainer(tmp_path, callbacks=[BoundReportCallback(report_every=1)]).train()
    assert len(load_records(tmp_path)) == 3
    (warning,) = [text for level, text in said if level == "warning"]
    assert "OSError: disk \\x1b[31mfull" in warning and f"trustkl report {tmp_path}" in warning


@pytest.mark.parametrize(
    ("options", "level"), [({}, "info"), ({"report": True}, "warning"), ({"report_every": 1}, "warning")]
)
def test_a_missing_package_is_a_warning_only_if_a_report_was_requested(tmp_path, monkeypatch, said, options, level):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    tiny.trainer(tmp_path, changes={"max_steps": 1}, callbacks=[BoundReportCallback(**options)]).train()
    assert said[0][0] == level and "pip install jinja2" in said[0][1]
    assert [each for each, _ in said].count("warning") == (level == "warning")
    assert len(load_records(tmp_path)) == 1


def test_only_the_first_process_writes(tmp_path, renders, capsys):
    trainer = tiny.trainer(tmp_path)
    callback = BoundReportCallback(report_every=1, table=True)
    trainer.state.is_world_process_zero = False
    for event in (callback.on_train_begin, callback.on_step_end, callback.on_train_end):
        event(trainer.args, trainer.state, trainer.control)
    assert renders == [] and capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def reports_of(trainer) -> list[BoundReportCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, BoundReportCallback)]


def test_a_callback_of_the_user_replaces_that_of_the_trainer(tmp_path, renders):
    class Mine(BoundReportCallback):
        pass

    mine, other = Mine(report=False), Stop()
    trainer = tiny.trainer(tmp_path, callbacks=[other, mine])
    assert reports_of(trainer) == [mine] and other in trainer.callback_handler.callbacks
    assert len(reports_of(tiny.trainer(tmp_path, callbacks=[BoundReportCallback]))) == 1
    assert with_report([other])[1:] == [other] and type(with_report(None)[0]) is BoundReportCallback
    added = BoundReportCallback(report=False)
    trainer.add_callback(added)
    assert reports_of(trainer) == [added]
    trainer.train()
    assert [row["update"] for row in load_records(tmp_path)] == [1]


def test_two_bound_report_callbacks_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="`callbacks` got 2 BoundReportCallback"):
        tiny.trainer(tmp_path, callbacks=[BoundReportCallback(), BoundReportCallback(report=False)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report_every": 0}, "`report_every` got 0; it must be a number of updates >= 1, or None"),
        ({"report_every": True}, "`report_every` got True"),
        ({"report_every": 2.5}, "`report_every` got 2.5"),
        ({"report": "yes"}, "`report` got 'yes'; it must be True, False or None"),
        ({"table": 1}, "`table` got 1"),
        ({"report": False, "report_every": 3}, "`report_every` got 3 with report=False"),
    ],
)
def test_bad_options_are_rejected(options, said):
    with pytest.raises(ConfigError) as error:
        BoundReportCallback(**options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("option", "terminal", "disable_tqdm", "printed"),
    [
        (None, True, True, True),
        (None, True, False, False),
        (None, False, True, False),
        (True, False, False, True),
        (True, True, True, True),
        (False, True, True, False),
    ],
)
def test_when_the_table_is_printed(tmp_path, monkeypatch, option, terminal, disable_tqdm, printed):
    out = Terminal()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    trainer = tiny.trainer(tmp_path, changes={"disable_tqdm": disable_tqdm})
    callback = BoundReportCallback(table=option)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", out)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        callback.on_record(trainer.args, trainer.state, trainer.control, record=record(), completions=[])
    assert (table.HEADER.strip() in out.text) == (" clip" in out.text.splitlines()[-1] if printed else False) == printed
