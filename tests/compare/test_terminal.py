"""The output of a comparison in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.compare.jobs import TASK, TWO, Instant
from tests.compare.reports import as_report, ordinary
from trl_trustkl.compare import page, terminal
from trl_trustkl.compare.runner import Outcome, jobs


def test_no_text_of_a_completion_controls_the_terminal(
    attacked: tuple[page.Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.show(Console(highlight=False, markup=False, emoji=False, width=80), *attacked)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e\u2066\x00\ud800") and "\\x1b[2J" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(attacked[1]) not in line)


def console() -> Console:
    return Console(file=io.StringIO(), highlight=False, markup=False, emoji=False, width=80)


def printed(on: Console) -> list[str]:
    return on.file.getvalue().splitlines()


def test_a_run_has_a_line_when_it_begins_and_one_when_it_ends(tmp_path):
    on, (first, second, *_) = console(), jobs(TWO, tmp_path, TASK)
    live = terminal.Live(on, total=4, finished=1, updates=3)
    with live.bar:
        live.started(first)
        live.ended(Outcome(first, 2.4, None))
        live.ended(Outcome(second, 61.0, "no luck"))
        live.progress(5)
    assert printed(on) == [
        "begins    a, seed 1", "finished  a, seed 1: 2 s (2 of 4 runs)", "FAILED    b, seed 1: 61 s (3 of 4 runs)",
    ]  # fmt: skip
    assert (live.bar.tasks[0].completed, live.bar.tasks[0].total) == (3 + 5, 12)


def test_the_plan_says_how_many_runs_are_finished(tmp_path):
    on = console()
    terminal.show_plan(on, TWO, tmp_path, planned=4, finished=0)
    terminal.show_plan(on, TWO._replace(updates=1, seeds=(1,)), tmp_path, planned=2, finished=1)
    assert printed(on) == [
        f"2 settings × 2 seeds, 3 updates each, in {tmp_path}",
        f"2 settings × 1 seed, 1 update each, in {tmp_path}; 1 of 2 runs are finished",
    ]


def test_a_failed_run_is_reported_with_its_log(tmp_path):
    on, (first, *_) = console(), jobs(TWO, tmp_path, TASK)
    terminal.show_failed(on, [Outcome(first, 1.0, "\x1b[31mno luck")])
    assert printed(on) == ["Failed: a, seed 1: \\x1b[31mno luck", f"        log: {first.folder / 'run.log'}"]


def test_the_table_has_spreads_only_where_there_are_several_seeds(tmp_path):
    for seeds, spread in (([1, 2], True), ([1], False)):
        on = console()
        on.print(terminal.summary_table(as_report(ordinary(tmp_path / str(spread), seeds))))
        text = on.file.getvalue()
        assert ("±" in text) == spread and "0.6" in text and "ref." in text


def test_nothing_is_started_where_every_run_is_finished(tmp_path):
    planned = jobs(TWO, tmp_path, TASK)
    start = Instant()
    assert terminal.make(console(), TWO, planned, [], 1, start) == [] and start.started == []
    on = console()
    assert [outcome.error for outcome in terminal.make(on, TWO, planned, planned[:1], 1, start)] == [None]
    assert start.started[0][:2] == ("a", 1) and "(4 of 4 runs)" in on.file.getvalue()
