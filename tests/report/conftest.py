"""Fixtures of the tests of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.example_runs import completions_of, rows_of, run_folder, write_run
from trl_trustkl.report import read_run, render_report
from trl_trustkl.report.schema import Run


@pytest.fixture(scope="session")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an ordinary run with every figure; tests read it and leave it unchanged."""
    changes = {"trust__max_ratio": 99.0, "counterfactual": {"anchor": 0.009, "clip": 0.015, "penalty": None}}
    return render_report(run_folder(tmp_path_factory.mktemp("ordinary"), **changes))


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a page's text: drawing takes most of the time of a report."""
    monkeypatch.setattr("trl_trustkl.report.figures.draw", lambda records: [])


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Run]:
    """Builds a run of `count` healthy updates with changes, as `rows_of` takes them."""

    def make(count: int = 12, ref_logp: Callable[[float], float] = lambda p: -50.0, **changes: Any) -> Run:
        rows = rows_of(count, **changes)
        return read_run(write_run(tmp_path / "run", rows, completions_of(rows, ref_logp)))

    return make
