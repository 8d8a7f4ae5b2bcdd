"""Small multiples: a panel for each metric, a line for each setting, over the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

# The report's own look: its palette, its ink, its axes.
from ..report.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Drawn,
    Kind,
    add_axes,
    add_legend,
    drawable,
    log_scale,
    plot_line,
    positive,
    render,
    update_axis,
)
from ..report.schema import Run
from ..report.series import Column, column, reference_per_token
from ..report.text import visible
from .metrics import Result

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
STYLES = ("-", "--", ":")  # past the sixth setting the colours come again

Series = Callable[[Run], tuple[Column, Column]]


class Panel(NamedTuple):
    """series: (updates, values) of a run; caption: the sentence that says how to read it."""

    title: str
    label: str
    caption: str
    series: Series
    log: bool = False


def _of(key: str, run: Run) -> tuple[Column, Column]:
    return column(run.records, "update"), column(run.records, key)


PANELS: dict[str, Panel] = {
    "score": Panel(
        "Score", "mean score",
        "Higher is what the reward asked for, which need not be what its author meant: read it beside the next panels.",
        partial(_of, "score"),
    ),
    "kl": Panel(
        "Distance to the reference", "KL to the reference\n(nats per response)",
        "The exact KL(π‖π_ref) at rollout: a line that keeps rising leaves the reference for good.",
        partial(_of, "anchor.kl_exact"),
    ),
    "update_kl": Panel(
        "Size of each update", r"KL($\pi_{\mathrm{old}}\,\|\,\pi$) after the update" "\n(nats per token, logarithmic)",
        "How far one update moved the policy away from the one that sampled its batch, measured after the step.",
        partial(_of, "trust.kl"), log=True,
    ),
    "ratio": Panel(
        "Largest ratio of each update", r"largest $\pi/\pi_{\mathrm{old}}$" "\n(logarithmic)",
        "The token that an update made likelier by the largest factor; a clip range of 0.2 ends at 1.2, and is no bound.",
        partial(_of, "trust.max_ratio"), log=True,
    ),
    "ref_logp": Panel(
        "What the reference thinks of the completions", "log-likelihood by the reference\n(nats per token)",
        "The lower, the less likely the original model would have written them; a score that rises while this falls was "
        "bought with strange text.",
        reference_per_token,
    ),
}  # fmt: skip


def draw(results: Sequence[Result]) -> list[Drawn]:
    """Every panel that any run has numbers for."""
    with np.errstate(all="ignore"):
        return [
            render(f"compare_{name}", Kind(panel.title, panel.caption, partial(_draw, panel, results)), [])
            for name, panel in PANELS.items()
        ]


def _draw(panel: Panel, results: Sequence[Result], figure: Figure, _: object) -> None:
    """Thin lines for the seeds, a thick one for their mean."""
    axes = add_axes(figure, panel.label)
    scale = positive if panel.log else drawable
    everything, last = [], 1.0
    for number, result in enumerate(results):
        lines = [panel.series(run) for run in result.runs.values()]
        lines = [(x, scale(y)) for x, y in lines if len(x)]
        if not lines:
            continue
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        look = {} if style == "-" else {"linestyle": style}
        colour = COLOURS[number % len(COLOURS)]
        if len(lines) > 1:
            for x, y in lines:
                plot_line(axes, x, y, colour, alpha=0.35, linewidth=0.7, marker="", **look)
        x, y = _mean(lines)
        plot_line(axes, x, y, colour, _label(result.name), linewidth=1.9, **look)
        everything += [y for _, y in lines]
        last = max(last, float(x[-1]))
    if not everything:
        axes.text(0.5, 0.5, "no numbers", color=INK, ha="center", transform=axes.transAxes)
    elif panel.log:
        log_scale(axes, *everything)
    update_axis(axes, np.array([1.0, last]))
    add_legend(axes)


def _mean(lines: Sequence[tuple[Column, Column]]) -> tuple[Column, Column]:
    """The mean over the runs at every update that any of them has."""
    x = np.unique(np.concatenate([at for at, _ in lines]))
    rows = np.full((len(lines), len(x)), np.nan)
    for row, (at, y) in zip(rows, lines, strict=True):
        row[np.searchsorted(x, at)] = y
    known = np.isfinite(rows)
    return x, np.where(known, rows, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _label(name: str) -> str:
    """The name as matplotlib shows it: no formula in it, and no underscore that would keep it out of a legend."""
    text = visible(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
