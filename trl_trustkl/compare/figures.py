"""Small multiples: a panel for each metric, a line for each setting, over the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..report import figures as shared
from ..report.schema import Run
from ..report.series import Column, column, reference_per_token
from ..report.text import visible
from .metrics import Result

COLOURS = (shared.BLUE, shared.ORANGE, shared.GREEN, shared.RED, shared.PURPLE, shared.SKY)
STYLES = ("-", "--", ":")  # after the sixth setting the colours repeat

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
        "A higher score is more reward, which may not be what its author intended: read this panel together with the others.",
        partial(_of, "score"),
    ),
    "kl": Panel(
        "Distance to the reference", "KL to the reference\n(nats per response)",
        "The exact KL(π‖π_ref) at rollout: if a line keeps rising, the policy drifts ever further from the reference model.",
        partial(_of, "anchor.kl_exact"),
    ),
    "update_kl": Panel(
        "Size of each update", r"KL($\pi_{\mathrm{old}}\,\|\,\pi$) after the update" "\n(nats per token, logarithmic)",
        "How far an update moved the policy away from the one that sampled its batch, measured after the update.",
        partial(_of, "trust.kl"), log=True,
    ),
    "ratio": Panel(
        "Largest ratio of each update", r"largest $\pi/\pi_{\mathrm{old}}$" "\n(logarithmic)",
        "The largest factor by which an update made a sampled token likelier; a clip range of 0.2 ends at 1.2 but is no bound.",
        partial(_of, "trust.max_ratio"), log=True,
    ),
    "ref_logp": Panel(
        "Likelihood of the completions under the reference", "log-likelihood under the reference\n(nats per token)",
        "Lower is less likely under the reference model; a score that rises while this falls was gained by unusual text.",
        reference_per_token,
    ),
}  # fmt: skip


def draw(results: Sequence[Result]) -> list[shared.Drawn]:
    with np.errstate(all="ignore"):
        return [
            shared.render(
                f"compare_{name}", shared.Kind(panel.title, panel.caption, partial(_draw, panel, results)), []
            )
            for name, panel in PANELS.items()
        ]


def _draw(panel: Panel, results: Sequence[Result], figure: Figure, _: object) -> None:
    """Thin lines for the seeds, a thick one for their mean."""
    axes = shared.add_axes(figure, panel.label)
    scale = shared.positive if panel.log else shared.drawable
    everything, last = [], 1.0
    for number, result in enumerate(results):
        lines = [panel.series(run) for run in result.runs.values()]
        lines = [(x, scale(y)) for x, y in lines if len(x)]
        if not lines:
            continue
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        look = {} if style == "-" else {"linestyle": style}
        colour = COLOURS[number % len(COLOURS)]
        for x, y in lines if len(lines) > 1 else ():
            shared.plot_line(axes, x, y, colour, alpha=0.35, linewidth=0.7, marker="", **look)
        x, y = _mean(lines)
        shared.plot_line(axes, x, y, colour, _label(result.name), linewidth=1.9, **look)
        everything += [y for _, y in lines]
        last = max(last, float(x[-1]))
    if not everything:
        axes.text(0.5, 0.5, "no numbers", color=shared.INK, ha="center", transform=axes.transAxes)
    elif panel.log:
        shared.log_scale(axes, *everything)
    shared.update_axis(axes, np.array([1.0, last]))
    shared.add_legend(axes)


def _mean(lines: Sequence[tuple[Column, Column]]) -> tuple[Column, Column]:
    """The mean over the runs, at every update that any of them has."""
    x = np.unique(np.concatenate([at for at, _ in lines]))
    rows = np.full((len(lines), len(x)), np.nan)
    for row, (at, y) in zip(rows, lines, strict=True):
        row[np.searchsorted(x, at)] = y
    known = np.isfinite(rows)
    return x, np.where(known, rows, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _label(name: str) -> str:
    """The name for a legend: without a formula, and without the leading underscore that would hide it."""
    text = visible(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
