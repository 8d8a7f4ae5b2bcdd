"""The page and the files of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.reports import as_report, ordinary
from tests.example_runs import rows_of, write_run
from tests.pages import Page
from trl_trustkl.compare import figures, page
from trl_trustkl.compare.metrics import result
from trl_trustkl.report import read_run


def test_completions_and_names_are_escaped_on_the_page(attacked: tuple[page.Report, Path]) -> None:
    raw = (attacked[1] / page.PAGE_FILE).read_text("utf-8")
    found = Page(raw)
    assert not {tag for tag, _ in found.elements} & {"script", "iframe", "svg", "object", "base", "link", "form", "a"}
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "href" not in names and "style" not in names
    for _, attributes in found.elements:
        assert (attributes.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    assert not set(raw) & set("\x1b\x07\u202e\u2066\x00")
    assert "<script>alert(1)</script>" in found.text and "\\x1b[2J" in found.text
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_page_says_what_was_compared(tmp_path: Path) -> None:
    report = as_report(ordinary(tmp_path), notes=["a, seed 3 failed: no luck"])
    page.save(report, tmp_path)
    text = Page((tmp_path / page.PAGE_FILE).read_text("utf-8")).text
    assert "2 settings, 3 updates each, seeds 1, 2." in text and "a, seed 3 failed: no luck" in text
    assert report.paragraph in text and "0.61\n± 0.01" in text and "kl_coef" in text
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == {
        f"compare_{name}" for name in figures.PANELS
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e308])
def test_numbers_missing_zero_or_extreme_have_a_page(tmp_path: Path, value: float | None) -> None:
    keys = ("score", "anchor__kl_exact", "trust__kl", "trust__max_ratio")
    run = read_run(write_run(tmp_path / "run", rows_of(2, **dict.fromkeys(keys, value))))
    results = [result(name, {}, {1: run, 2: run}, last=1) for name in ("$x", "_y")]
    page.save(as_report(results), tmp_path)
    assert (tmp_path / page.PAGE_FILE).exists()
