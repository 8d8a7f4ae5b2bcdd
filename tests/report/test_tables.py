"""The tables of a report."""

from __future__ import annotations

from pathlib import Path

from tests.example_runs import SAMPLE_KEYS, rows_of, run_folder, write_run
from tests.pages import Page
from trl_trustkl.report import read_run, render_report
from trl_trustkl.report.tables import moments


def test_completions_at_start_middle_and_end(tmp_path: Path) -> None:
    shown = moments(read_run(run_folder(tmp_path, 12)))
    assert [(moment.when, moment.update) for moment in shown] == [("start", 1), ("middle", 7), ("end", 12)]
    two = moments(read_run(run_folder(tmp_path, 2)))
    assert [(moment.when, moment.update) for moment in two] == [("start", 1), ("end", 2)]
    assert [moment.when for moment in moments(read_run(run_folder(tmp_path, 1)))] == ["start"]


def test_a_long_completion_is_cut_and_its_length_told(tmp_path: Path) -> None:
    rows = [{**SAMPLE_KEYS, "completion": "<b>" * 4_000_000}]
    page = render_report(write_run(tmp_path, rows_of(1), rows))
    assert page.stat().st_size < 2_000_000
    assert "(11,998,800 more characters)" in Page(page.read_text("utf-8")).text
