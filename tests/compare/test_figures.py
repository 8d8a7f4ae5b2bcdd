"""The figures of a comparison."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.compare.reports import ordinary
from tests.example_runs import rows_of, write_run
from trl_trustkl.compare import figures
from trl_trustkl.compare.metrics import result
from trl_trustkl.report import read_run


def test_the_mean_line_covers_runs_of_different_lengths() -> None:
    x, y = figures._mean([(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])), (np.array([2.0]), np.array([4.0]))])
    assert x.tolist() == [1, 2, 3] and y.tolist() == [1, 3, 3]


def test_there_is_a_figure_for_each_panel_that_does_not_change_with_the_numbers(tmp_path):
    drawn = figures.draw(ordinary(tmp_path))
    assert [figure.name for figure in drawn] == [f"compare_{name}" for name in figures.PANELS]
    for figure, panel in zip(drawn, figures.PANELS.values(), strict=True):
        assert (figure.title, figure.caption) == (panel.title, panel.caption) and panel.caption.endswith(".")
        assert figure.svg.lstrip().startswith("<?xml") and figure.png.startswith(b"\x89PNG")
    assert [figure.svg for figure in figures.draw(ordinary(tmp_path))] == [figure.svg for figure in drawn]


def test_a_panel_has_a_labelled_line_for_each_setting_and_a_thin_one_for_each_seed(tmp_path):
    figure = Figure()
    figures._draw(figures.PANELS["score"], ordinary(tmp_path), figure, None)
    (axes,) = figure.axes
    assert axes.get_legend_handles_labels()[1] == ["a", "b"] and axes.get_xlabel() == "update"
    means = {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert means["a"] == pytest.approx([0.215] * 4) and means["b"] == pytest.approx([0.615] * 4)
    assert len(axes.lines) == 2 * (2 + 1)
    assert len({line.get_color() for line in axes.lines}) == 2


def test_a_panel_without_numbers_says_so(tmp_path):
    run = read_run(write_run(tmp_path, rows_of(2)))
    figure = Figure()
    figures._draw(figures.PANELS["ref_logp"], [result("a", {}, {1: run}, last=1)], figure, None)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no numbers"]


def test_a_name_is_not_read_as_a_formula_and_appears_in_the_legend():
    assert (
        figures._label("$x^2$") == r"\$x^2\$" and figures._label("_y") == " _y" and figures._label("\x1bz") == "\\x1bz"
    )
