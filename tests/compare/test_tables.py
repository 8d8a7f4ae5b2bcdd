"""The tables of a comparison, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tests.compare.reports import ordinary
from tests.pages import ATTACKS
from trl_trustkl.compare import page, tables
from trl_trustkl.compare.metrics import METRICS
from trl_trustkl.report.text import markdown


def test_the_csv_has_a_line_for_each_run_unrounded(tmp_path: Path) -> None:
    results = ordinary(tmp_path)
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(results))))
    assert [(row["setting"], row["seed"]) for row in rows] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert set(rows[0]) == {"setting", "seed", *METRICS}
    assert [float(row["score"]) for row in rows] == [0.2 + 0.01, 0.2 + 0.02, 0.6 + 0.01, 0.6 + 0.02]
    assert rows[0]["distinct_2"] == ""  # completions of one word have no pairs


def test_the_markdown_has_means_spreads_and_meanings(tmp_path: Path) -> None:
    results = ordinary(tmp_path)
    text = tables.as_markdown(results, "Words.", "last update", 0.02)
    (row,) = [line for line in text.splitlines() if line.startswith("| b |")]
    assert row.startswith("| b | 2 | 0.61 ± 0.01 | 0.61 ± 0.01 | 6 ± 0 |") and row.endswith("| c |")
    assert "exceeded 0.02 nats/token" in text and "sample standard deviation" in text
    one = tables.as_markdown(ordinary(tmp_path / "one", [1]), "Words.", "last update", 0.02)
    assert "| a | 1 | 0.21 ± – |" in one


def test_nothing_of_a_completion_is_markup_in_markdown(attacked: tuple[page.Report, Path]) -> None:
    text = (attacked[1] / page.MARKDOWN_FILE).read_text("utf-8")
    assert "<" not in text.replace("&lt;", "") and not set(text) & set("\x1b\x07\u202e")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in rows}
    assert len(rows) == len(ATTACKS) + 2 and cells == {len(METRICS) + 4}
    evil = markdown("[x](javascript:1) ![](http://e) `a` *b* <i> a|b https://e\nnext")
    assert evil == (
        "\\[x\\](javascript:1) \\!\\[\\](\u200bhttp://e) \\`a\\` \\*b\\* &lt;i&gt; a\\|b \u200bhttps://e next"
    )
