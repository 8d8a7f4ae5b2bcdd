"""The figures of a report: files, labels, and long runs."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests.example_runs import rising, run_folder
from tests.processes import ROOT
from tests.report.contrast import contrast
from trl_trustkl.report import read_run
from trl_trustkl.report.figures import (
    BLUE,
    FIGURES,
    INK,
    INK_ON_DARK,
    MECHANISMS,
    counterfactual,
    draw,
    envelope,
    gated,
    log_scale,
    ratios,
    score,
)
from trl_trustkl.report.series import COUNTERFACTUALS


def test_figures_are_written_as_light_and_dark_svg_and_as_png(ordinary: Path) -> None:
    folder = ordinary.parent / "figures"
    for name in FIGURES:
        light, dark = ((folder / f"{name}{ink}.svg").read_text("utf-8") for ink in ("", "-dark"))
        assert ET.fromstring(light).tag.endswith("svg") and ET.fromstring(dark).tag.endswith("svg")
        assert light != dark and len(light) == len(dark)
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_has_labelled_axes(tmp_path: Path) -> None:
    records = read_run(run_folder(tmp_path, counterfactual={"clip": 0.02})).records
    for name, kind in FIGURES.items():
        figure = Figure()
        kind.draw(figure, records)
        assert all(axes.get_ylabel() for axes in figure.axes), name
        assert figure.axes[0].get_xlabel() or figure.axes[-1].get_xlabel(), name


def test_equal_records_give_equal_figures(tmp_path: Path) -> None:
    records = read_run(run_folder(tmp_path)).records
    first, second = draw(records), draw(records)
    assert [figure.svg for figure in first] == [figure.svg for figure in second]


@pytest.mark.processes
def test_drawing_does_not_affect_pyplot(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    code = f"""
import sys, matplotlib
before = matplotlib.rcParams.copy()
from trl_trustkl.report import render_report
render_report({str(folder)!r})
assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_envelope_keeps_every_spike() -> None:
    y = np.zeros(10_000)
    y[4321], y[8765] = 9.0, -9.0
    found = envelope(np.arange(10_000.0), y, bins=200)
    assert len(found.x) == 200 and found.high.max() == 9 and found.low.min() == -9 and not found.median.any()
    gap = np.where(np.arange(10_000) < 5_000, np.nan, 1.0)
    assert np.isfinite(envelope(np.arange(10_000.0), gap, bins=200).median).sum() == 100


def lines_of(records: Any) -> dict[str, Any]:
    """The lines of the figure of counterfactuals by their labels, and its axes."""
    figure = Figure()
    counterfactual(figure, records)
    (axes,) = figure.axes
    return {str(line.get_label()): line for line in axes.lines} | {"axes": axes}


def test_the_kl_without_each_mechanism_that_was_on_is_drawn_at_the_attributed_updates(run_of) -> None:
    without = {"clip": 0.03, "penalty": None, "grad_norm": 0.01, "value_clip": 0.008}
    run = run_of(24, counterfactual=lambda p: without if round(24 * p) % 8 == 0 else None, trust__kl=lambda p: p / 100)
    found = lines_of(run.records)
    axes = found.pop("axes")
    assert list(found) == ["as it was", "clip", "gradient norm", "value clip"]
    assert all(line.get_xdata().tolist() == [8, 16, 24] for line in found.values())
    np.testing.assert_allclose(found["as it was"].get_ydata(), [1 / 300, 2 / 300, 0.01])
    assert found["clip"].get_ydata().tolist() == [0.03] * 3 and found["value clip"].get_ydata().tolist() == [0.008] * 3
    assert axes.get_yscale() == "log" and axes.get_xlim() == (0.5, 24.5)
    wide = found.pop("as it was")
    assert wide.get_color() == INK and all(wide.get_linewidth() > 3 * line.get_linewidth() for line in found.values())


@pytest.mark.parametrize("count", [1, 2, 700])
def test_few_and_many_counterfactuals_are_drawn(run_of, count: int) -> None:
    found = lines_of(run_of(count, counterfactual=dict.fromkeys(COUNTERFACTUALS, 0.02)).records)
    assert len(found) == 2 + len(COUNTERFACTUALS)
    assert all(len(line.get_xdata()) == min(count, 120) for name, line in found.items() if name != "axes")
    assert found["clip"].get_marker() == ("o" if count <= 40 else "None")


def test_a_mechanism_has_one_colour_in_both_figures(run_of) -> None:
    assert list(MECHANISMS) == list(COUNTERFACTUALS)
    assert len({color for _, color in MECHANISMS.values()}) == len(MECHANISMS)
    names = [name for name in MECHANISMS if name != "value_clip"]
    records = run_of(2, counterfactual=dict.fromkeys(names, 0.02), shares=dict.fromkeys(names, 0.1)).records
    lines, figure = lines_of(records), Figure()
    gated(figure, records)
    bars = {str(bar.get_label()): to_hex(bar[0].get_facecolor()) for bar in figure.axes[0].containers}
    assert len(bars) == 8 and bars == {label: to_hex(lines[label].get_color()) for label in bars}


@pytest.mark.parametrize(
    "counterfactuals",
    [None, {}, {"clip": None, "anchor": None}, {"clip": 0.0}, {"clip": -1e-9}, {"made up": 1.0}],
)
def test_a_figure_applies_to_records_that_have_anything_to_draw(run_of, counterfactuals) -> None:
    applies = FIGURES["counterfactual"].applies
    assert not applies(run_of(3, counterfactual=counterfactuals).records)
    assert applies(run_of(3, counterfactual=lambda p: {"clip": 0.02} if p == 1 else counterfactuals).records)


def test_a_figure_that_does_not_apply_is_left_out(run_of) -> None:
    assert [figure.name for figure in draw(run_of(3).records)] == [name for name in FIGURES if name != "counterfactual"]


def test_the_score_is_drawn_against_the_update(run_of) -> None:
    figure = Figure()
    score(figure, run_of(5, score=rising).records)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5] and axes.get_ylabel() == "mean score"
    np.testing.assert_allclose(line.get_ydata(), [rising(n / 5) for n in range(1, 6)])


ZERO: dict[str, dict[str, Any]] = {
    "score": {"score": 0.0},
    "frontier": {"anchor__kl_exact": 0.0},
    "anchor": {"anchor__kl_exact": 0.0},
    "trust_region": {"trust__kl": 0.0, "trust__kl_proposed": 0.0, "trust__kl_max": 0.0},
    "gated": {"shares": {"clip": 0.0}, "trust__gated": 0.0, "anchor__share": 0.0, "value__gated": 0.0},
    "ratios": {"trust__max_ratio": 0.0},
    "gradient": {"gradient__norm": 0.0},
}


@pytest.mark.parametrize("name", ZERO)
def test_a_figure_of_zeros_is_left_out(run_of, name: str) -> None:
    assert FIGURES[name].applies(run_of(3).records)
    assert not FIGURES[name].applies(run_of(3, **ZERO[name]).records)


def test_a_single_update_has_no_figures(run_of) -> None:
    assert draw(run_of(1).records) == [] and draw(run_of(2).records)


def test_the_alternative_text_is_what_is_drawn(run_of) -> None:
    changes = {"score": lambda p: 0.9 if p == 0.5 else p, "shares": {"clip": 0.25}, "gradient__max_norm": 2.0}
    said = {figure.name: figure.alt for figure in draw(run_of(4, **changes).records)}
    assert said["score"] == "The score. By update: mean score from 0.25 to 1, at most 1."
    assert said["gated"] == "How much each mechanism intervened in the updates. By update: clip 0.25."
    assert said["gradient"].endswith("By update: norm 0.5; max_grad_norm 2.")
    assert said["trust_region"].endswith("By update: worst token 0.3; mean, as measured 0.01.")
    assert "at most 1" in said["frontier"] and "β 0.05" in said["anchor"]


@pytest.mark.parametrize("values", [(0.0165, 0.0191), (0.07, 0.19), (0.3, 40.0), (1e-7, 1e3)])
def test_a_logarithmic_axis_has_at_least_two_numbers(values: tuple[float, float]) -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], values)
    log_scale(axes, np.array(values))
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.3), (1.0, 1e9), (0.2, 1e9)], ids=["no low", "neither", "no high"])
def test_an_absent_end_of_the_clip_range_is_just_beyond_the_values(run_of, low: float, high: float) -> None:
    figure = Figure()
    ratios(figure, run_of(3, trust__low=low, trust__high=high, trust__max_ratio=2.0).records)
    bottom, top = figure.axes[0].get_ylim()
    assert 0.01 < bottom < 1 < top < 10
    band = figure.axes[0].patches[0].get_window_extent()
    assert band.height > 1


def test_colours_can_be_seen_on_light_and_on_dark_pages() -> None:
    assert min(contrast(INK, "#ffffff"), contrast(INK_ON_DARK, "#1b1f24")) > 7
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for _, color in MECHANISMS.values():
        assert contrast(color, "#ffffff") > 2.2 and (color == INK or contrast(color, "#1b1f24") > 3), color
    assert contrast(BLUE, "#1b1f24") > 3
