"""The figures of a report: files, labels, and long runs."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from tests.example_runs import run_folder
from tests.processes import ROOT
from trl_trustkl.report import read_run
from trl_trustkl.report.figures import FIGURES, draw, envelope


def test_figures_are_written_as_light_and_dark_svg_and_as_png(ordinary: Path) -> None:
    folder = ordinary.parent / "figures"
    for name in FIGURES:
        light, dark = ((folder / f"{name}{ink}.svg").read_text("utf-8") for ink in ("", "-dark"))
        assert ET.fromstring(light).tag.endswith("svg") and ET.fromstring(dark).tag.endswith("svg")
        assert light != dark and len(light) == len(dark)
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_has_labelled_axes_and_one_sentence(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    records = read_run(run_folder(tmp_path)).records
    for name, kind in FIGURES.items():
        figure = Figure()
        kind.draw(figure, records)
        assert all(axes.get_ylabel() for axes in figure.axes), name
        assert figure.axes[0].get_xlabel() or figure.axes[-1].get_xlabel(), name
        assert kind.caption.endswith(".") and kind.caption.count(". ") == 0, name


def test_equal_records_give_equal_figures(tmp_path: Path) -> None:
    records = read_run(run_folder(tmp_path)).records
    first, second = draw(records), draw(records)
    assert [figure.svg for figure in first] == [figure.svg for figure in second]


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
