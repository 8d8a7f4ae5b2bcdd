"""`render_report`: short, long and extreme runs, several runs, and a missing package."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.example_runs import completions_of, rows_of, run_folder, write_run
from tests.pages import Page
from trl_trustkl.errors import DataError
from trl_trustkl.report import MissingPackageError, read_run, render_report
from trl_trustkl.report.series import COUNTERFACTUALS
from trl_trustkl.report.tables import ROWS, updates


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "one"), run_folder(tmp_path / "two", trust__limit=0.005)]
    page = render_report(folders, tmp_path / "out" / "both.html")
    text = Page(page.read_text("utf-8")).text
    assert "Side by side" in text and text.index("Side by side") < text.index("Summary")
    assert "no limit" in text and "100 %" in text
    assert (tmp_path / "one" / "figures" / "anchor.svg").exists() and (
        tmp_path / "two" / "figures" / "anchor.png"
    ).exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_updates_of_a_run_have_a_report(tmp_path: Path, count: int) -> None:
    page = render_report(run_folder(tmp_path, count)).read_text("utf-8")
    assert len(page) > (10_000 if count == 1 else 100_000)
    assert ("a figure needs two" in page) == (count == 1)


NUMBERS = {
    "": ["score", "lr", "length"],
    "anchor__": ["coef", "kl", "kl_exact", "kl_stderr", "share", "target"],
    "trust__": ["low", "epochs", "gated", "kl", "kl_max", "kl_proposed", "max_ratio"],
    "gradient__": ["norm", "max_norm", "scale"],
    "value__": ["explained_variance"],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e308, -1e308, 1e-308])
def test_numbers_missing_zero_or_extreme_have_a_report(tmp_path: Path, value: float | None) -> None:
    changes = {prefix + key: value for prefix, keys in NUMBERS.items() for key in keys}
    quantiles = {} if value is None else dict.fromkeys(("0.01", "0.5", "0.99"), value)
    without = dict.fromkeys(COUNTERFACTUALS, value)
    run = run_folder(tmp_path, 5, **changes, trust__ratio_quantiles=quantiles, counterfactual=without)
    assert render_report(run).exists()


@pytest.mark.slow
def test_ten_thousand_updates_in_ten_seconds_and_five_megabytes(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    rows = rows_of(10_000)
    for row, (a, b, c, d) in zip(rows, draws.lognormal(size=(10_000, 4)), strict=True):
        row["score"], row["anchor"]["kl_exact"], row["anchor"]["coef"] = float(a), float(6 * b), float(c)
        row["trust"] |= {
            "kl": 0.01 * d,
            "kl_proposed": 0.02 * d,
            "limit": 0.02,
            "max_ratio": 1 + a,
            "scale": min(1.0, b),
        }
        row["gradient"]["norm"] = float(c)
        row["counterfactual"] = {name: 0.01 * a * (i + 1) for i, name in enumerate(COUNTERFACTUALS)}
    run = write_run(tmp_path, rows, completions_of(rows))
    started = time.process_time()
    page = render_report(run)
    assert time.process_time() - started < 10
    assert page.stat().st_size < 5_000_000
    assert all(file.stat().st_size < 600_000 for file in (tmp_path / "figures").iterdir())
    assert len(updates(read_run(run)).rows) == ROWS


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"A report needs {package}, .* pip install {package}$"):
        render_report(run_folder(tmp_path))


@pytest.mark.parametrize("name", ["bounds.jsonl", "completions.jsonl", "run_settings.json", ""])
def test_a_file_of_a_run_is_not_replaced_by_the_page(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path)
    before = (folder / "bounds.jsonl").read_bytes()
    with pytest.raises(DataError, match="must be the path of a page"):
        render_report(folder, folder / name if name else "")
    assert (folder / "bounds.jsonl").read_bytes() == before
