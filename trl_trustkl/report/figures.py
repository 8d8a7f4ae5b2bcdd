"""The figures of a report: small for any number of updates, readable on light and dark pages.

They use Figure objects and never pyplot, so that drawing does not affect the caller's figures and settings. The colours are
those of Okabe and Ito, which are distinguishable with any colour vision, with a darker yellow that can be seen on white. On a
dark page, one neutral colour is replaced.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..files import write_atomically
from . import captions
from .captions import BARS, POINTS, Records
from .series import Column, attributed, column, distance, kl_without, quantile, shares, to_reference, token_range
from .text import number

BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"
YELLOW, BROWN = "#8f8000", "#9c6450"
INK, INK_ON_DARK = "#42474d", "#c3c8ce"
EARLY_TO_LATE = LinearSegmentedColormap.from_list("early_to_late", [SKY, PURPLE, RED])
RATIO = 1e4  # an end of a clip range beyond it, or below its inverse, is drawn as no end
LARGEST = 1e30  # a larger number is drawn here: axes overflow before floats do
MECHANISMS = {
    "anchor": ("anchor", BLUE), "clip": ("clip", ORANGE), "response_mask": ("response masks", BROWN),
    "penalty": ("penalty", SKY), "stop": ("early stop", GREEN),
    "backtrack": ("backtracking", RED), "grad_norm": ("gradient norm", PURPLE), "lr": ("learning rate", INK),
    "value_clip": ("value clip", YELLOW),
}  # fmt: skip
"""The label and the colour of each mechanism."""


class Drawn(NamedTuple):
    """A figure in the forms that a page needs. `alt` describes it; `dark` is `svg` in the colour for dark pages."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes

    @property
    def dark(self) -> str:
        return self.svg.replace(INK, INK_ON_DARK)


class Kind(NamedTuple):
    """A figure's title, the caption that says how to read it, the function that draws it, and whether there is anything to
    draw."""

    title: str
    caption: str | Callable[[Records], str]
    draw: Callable[[Figure, Records], None]
    applies: Callable[[Records], bool] = lambda records: True


# -- many updates on few pixels ----------------------------------------------------------------------------------------


class Envelope(NamedTuple):
    """A long line in bins: the mean x of each, and the smallest, largest and median y. No spike is lost."""

    x: Column
    low: Column
    high: Column
    median: Column


def envelope(x: Column, y: Column, bins: int = POINTS) -> Envelope:
    return Envelope(binned(x, bins), *(binned(y, bins, reduce) for reduce in (np.nanmin, np.nanmax, np.nanmedian)))


def binned(values: Column, bins: int, reduce: Callable[..., Any] = np.nanmean) -> Column:
    """One number for each of at most `bins` bins."""
    if len(values) <= bins:
        return values
    parts = np.array_split(values, bins)
    return np.array([np.nan if np.isnan(part).all() else reduce(part) for part in parts])


def drawable(values: Column) -> Column:
    return np.clip(values, -LARGEST, LARGEST)


def positive(values: Column) -> Column:
    """The values for a logarithmic axis, NaN where they are not positive."""
    return np.where(values > 0, np.clip(values, 1 / LARGEST, LARGEST), np.nan)


# -- what all figures share --------------------------------------------------------------------------------------------


def add_axes(figure: Figure, ylabel: str, xlabel: str = "update", place: Any = 111, sharex: Axes | None = None) -> Axes:
    axes = figure.add_subplot(place, sharex=sharex)
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    axes.patch.set_alpha(0.0)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(colors=INK, which="both", labelsize=8.5)
    axes.grid(True, color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def update_axis(axes: Axes, x: Column) -> None:
    """Integers on the axis, also for a single update."""
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def plot_line(axes: Axes, x: Column, y: Column, color: str, label: str | None = None, **style: Any) -> None:
    """A line, with dots for few updates, or median and envelope for many; nothing if there is no finite value."""
    if not np.isfinite(y).any():
        return
    if len(x) > 2 * POINTS:
        x, low, high, y = envelope(x, y)
        axes.fill_between(x, low, high, color=color, alpha=0.28, linewidth=0)
    dots = {"marker": "o", "markersize": 2.8} if len(x) <= 40 and "linestyle" not in style else {}
    axes.plot(x, y, color=color, label=label, **{"linewidth": 1.4, **dots, **style})


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, where it does not hide anything."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False,
            fontsize=8, handlelength=1.4, handletextpad=0.5, columnspacing=1.2,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_color(INK)


def log_scale(axes: Axes, *drawn: Column) -> None:
    """A logarithmic axis if any value drawn is positive; within two decades it has ticks at 1, 2 and 5, and evenly spaced
    ones within a factor of 5, where those may be missing."""
    values = np.concatenate(drawn)
    values = values[values > 0]
    if not values.size:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()  # with what else is drawn, such as a clip range
    decades = np.log10(max(values.max(), high) / min(values.min(), low)) if low > 0 else 9.0
    logarithmic = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=8)
    axes.yaxis.set_major_locator(MaxNLocator(5) if decades < 0.7 else logarithmic)
    if values.min() >= 1e-4 and values.max() < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


# -- the figures -------------------------------------------------------------------------------------------------------


def score(figure: Figure, records: Records) -> None:
    x, axes = column(records, "update"), add_axes(figure, "mean score")
    plot_line(axes, x, drawable(column(records, "score")), BLUE, "mean score")
    update_axis(axes, x)


def frontier(figure: Figure, records: Records) -> None:
    kl = np.sqrt(np.clip(drawable(distance(records)), 0.0, None))
    scores, update = drawable(column(records, "score")), column(records, "update")
    axes = add_axes(figure, "mean score", "√KL to the reference  (√nats per response)")
    stride, size = captions.stride_of(len(kl)), 14 if len(kl) > 60 else 26
    points = axes.scatter(
        kl[::stride], scores[::stride], c=update[::stride], cmap=EARLY_TO_LATE, s=size, alpha=0.8, linewidths=0,
    )  # fmt: skip
    # A thin line through the means of successive bins shows the path of the run.
    axes.plot(binned(kl, 12), binned(scores, 12), color=INK, linewidth=1.0, alpha=0.7, label="mean score")
    bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    bar.set_label("update", color=INK, fontsize=9)


def anchor(figure: Figure, records: Records) -> None:
    x, (kl, target, unit) = column(records, "update"), to_reference(records)
    kl, target, coef = drawable(kl), drawable(target), drawable(column(records, "anchor.coef"))
    error = drawable(column(records, "anchor.kl_stderr"))
    if unit == "nats per token":
        error = error / column(records, "length")
    penalised = (coef > 0).any()
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2), hspace=0.12) if penalised else [111]
    above = add_axes(figure, f"KL to the reference\n({unit})", "" if penalised else "update", grid[0])
    middle = binned(x, POINTS)
    if np.isfinite(error).any():
        low, high = binned(kl - error, POINTS, np.nanmin), binned(kl + error, POINTS, np.nanmax)
        above.fill_between(middle, low, high, color=BLUE, alpha=0.25, linewidth=0, label="± stderr")
    plot_line(above, x, kl, BLUE, "KL to the reference")
    plot_line(above, x, target, RED, "target", linestyle="--")
    if unit == "nats per response" and np.isfinite(hard := column(records, "anchor.limit")).any():
        after = drawable(column(records, "anchor.kl_after"))
        plot_line(above, x, after, SKY, "after the update", linewidth=0.9)
        plot_line(above, x, drawable(hard), INK, "hard limit", linestyle=":")
    add_legend(above, 3)
    if not penalised:
        update_axis(above, x)
        return
    above.tick_params(labelbottom=False)
    below = add_axes(figure, "β", "update", grid[1], sharex=above)
    plot_line(below, x, coef, GREEN, "β")
    below.set_ylim(bottom=0)
    update_axis(below, x)
    figure.align_ylabels()


def trust_region(figure: Figure, records: Records) -> None:
    x, keys = column(records, "update"), ("kl_proposed", "kl", "limit", "kl_max", "limit_token")
    proposed, kl, limit, worst, of_token = (positive(column(records, f"trust.{key}")) for key in keys)
    axes = add_axes(figure, r"KL($\pi_{\mathrm{old}}\,\|\,\pi$) after the update" "\n(nats per token)")
    plot_line(axes, x, worst, SKY, "worst token", linewidth=0.9, alpha=0.8)
    if (column(records, "trust.scale") < 1).any():
        plot_line(axes, x, proposed, ORANGE, "mean, without enforcement")
    plot_line(axes, x, kl, BLUE, "mean, as measured")
    plot_line(axes, x, limit, RED, "limit that is enforced", linestyle="--")
    plot_line(axes, x, of_token, RED, "limit of each token", linestyle=":")
    log_scale(axes, proposed, kl, limit, worst, of_token)
    update_axis(axes, x)
    add_legend(axes)


def gated(figure: Figure, records: Records) -> None:
    axes = add_axes(figure, "share of the update\nwith an intervention (stacked)")
    x = column(records, "update")
    middle, width = binned(x, BARS), max(1.0, len(x) / BARS) if len(x) > 60 else 0.9
    bottom = np.zeros(len(middle))
    for name, values in shares(records).items():
        if (values > 0).any():
            label, color = MECHANISMS[name]
            height = binned(values, BARS)
            axes.bar(middle, height, 0.9 * width, bottom, color=color, label=label, linewidth=0, alpha=0.85)
            bottom = bottom + height
    update_axis(axes, x)
    axes.set_ylim(0, max(0.05, 1.05 * float(bottom.max())))
    add_legend(axes, 3)


def counterfactual(figure: Figure, records: Records) -> None:
    rerun = attributed(records)
    x, kl = binned(column(rerun, "update"), BARS), binned(positive(column(rerun, "trust.kl")), BARS)
    without = {name: binned(positive(values), BARS) for name, values in kl_without(rerun).items()}
    axes = add_axes(figure, r"KL($\pi_{\mathrm{old}}\,\|\,\pi$) without a mechanism" "\n(nats per token)")
    # Wide and below the others, so that it is seen where they are equal to it.
    plot_line(axes, x, kl, INK, "as it was", linewidth=5, markersize=9.5, alpha=0.35, markeredgewidth=0)
    for i, (name, values) in enumerate(without.items()):
        label, color = MECHANISMS[name]
        size = 7.5 - 0.8 * i  # of equal points, each remains visible
        plot_line(axes, x, values, color, label, linewidth=1.2, markersize=size, markeredgewidth=0)
    log_scale(axes, kl, *without.values())
    update_axis(axes, column(records, "update"))
    add_legend(axes, 3)


def has(*keys: str) -> Callable[[Records], bool]:
    """Whether one of these numbers is above 0 in any update."""
    return lambda records: any((column(records, key) > 0).any() for key in keys)


def has_score(records: Records) -> bool:
    """Whether any update has a score other than 0."""
    return bool(np.nan_to_num(column(records, "score")).any())


def has_distance(records: Records) -> bool:
    """Whether any update has a KL to the reference other than 0."""
    return bool(np.nan_to_num(to_reference(records).kl).any())


def has_frontier(records: Records) -> bool:
    """Whether any update has a score and a KL to the reference above 0."""
    return bool(((distance(records) > 0) & np.isfinite(column(records, "score"))).any())


def has_interventions(records: Records) -> bool:
    """Whether any mechanism intervened in any update."""
    return any((values > 0).any() for values in shares(records).values())


def has_counterfactual(records: Records) -> bool:
    """Whether there is an update whose KL without some mechanism can be drawn."""
    return any((values > 0).any() for values in kl_without(records).values())


def ratios(figure: Figure, records: Records) -> None:
    x, last = column(records, "update"), records[-1].trust
    levels = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")
    at = {level: positive(quantile(records, level)) for level in levels}
    top = positive(column(records, "trust.max_ratio"))
    axes = add_axes(figure, r"ratio $\pi/\pi_{\mathrm{old}}$ at the sampled tokens")
    middle = binned(x, POINTS)
    if (clip := token_range(last)) is not None:
        # An end that is 0 or infinite is drawn just beyond the values, which would be a line otherwise.
        drawn = np.concatenate([top, *at.values(), [1.0]])
        ends = np.nanmin(drawn) / 2, 2 * np.nanmax(drawn)
        low, high = np.where((np.array(clip) > 1 / RATIO) & (np.array(clip) < RATIO), clip, ends)
        axes.axhspan(low, high, color=INK, alpha=0.18, linewidth=0, label="clip range")
    for i, (alpha, label) in enumerate([(0.2, "1 % to 99 %"), (0.3, "5 % to 95 %"), (0.45, "25 % to 75 %")]):
        low, high = binned(at[levels[i]], POINTS), binned(at[levels[-1 - i]], POINTS)
        axes.fill_between(middle, low, high, color=BLUE, alpha=alpha, linewidth=0, label=label)
    plot_line(axes, x, top, RED, "largest", linewidth=0.9)
    plot_line(axes, middle, binned(at["0.5"], POINTS), BLUE, "median")
    log_scale(axes, top, *at.values())
    update_axis(axes, x)
    add_legend(axes, 3)


def gradient(figure: Figure, records: Records) -> None:
    x = column(records, "update")
    norm, limit = positive(column(records, "gradient.norm")), positive(column(records, "gradient.max_norm"))
    axes = add_axes(figure, "norm of the policy's gradient\n(before clipping, mean over the steps)")
    plot_line(axes, x, norm, BLUE, "norm")
    plot_line(axes, x, limit, RED, "max_grad_norm", linestyle="--")
    log_scale(axes, norm, limit)
    update_axis(axes, x)
    add_legend(axes)


FIGURES: dict[str, Kind] = {
    "score": Kind("The score", captions.score, score, has_score),
    "frontier": Kind("Score against distance from the reference", captions.frontier, frontier, has_frontier),
    "anchor": Kind("The anchor: KL to the reference and its coefficient", captions.anchor, anchor, has_distance),
    "trust_region": Kind(
        "The trust region: how far each update moved the policy",
        captions.trust_region,
        trust_region,
        has("trust.kl", "trust.kl_proposed", "trust.kl_max"),
    ),
    "gated": Kind("How much each mechanism intervened in the updates", captions.gated, gated, has_interventions),
    "counterfactual": Kind(
        "How far each update would have gone without a mechanism",
        captions.counterfactual,
        counterfactual,
        has_counterfactual,
    ),
    "ratios": Kind("The ratios after each update", captions.ratios, ratios, has("trust.max_ratio")),
    "gradient": Kind("The gradient's norm", captions.gradient, gradient, has("gradient.norm")),
}
"""Every figure by the name of its files."""


def draw(records: Records) -> list[Drawn]:
    """The figures for which the records have anything to draw; none for a single update, which has no course."""
    if records[0].update == records[-1].update:
        return []
    return [render(name, kind, records) for name, kind in FIGURES.items() if kind.applies(records)]


def render(name: str, kind: Kind, records: Records) -> Drawn:
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    kind.draw(figure, records)
    vector, pixels = io.StringIO(), io.BytesIO()
    # With the salt, equal records give equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # reuse the layout: computing it takes half of the time
    figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    caption = kind.caption if isinstance(kind.caption, str) else kind.caption(records)
    return Drawn(name, kind.title, caption, in_words(kind.title, figure), vector.getvalue(), pixels.getvalue())


def in_words(title: str, figure: Figure) -> str:
    """The title, and the course of each labelled line and of each kind of bars."""
    courses: list[tuple[object, Any]] = []
    for axes in figure.axes:
        courses += [(line.get_label(), line.get_ydata()) for line in axes.lines]
        courses += [(bars.get_label(), [bar.get_height() for bar in bars]) for bars in axes.containers]
    parts = []
    for label, course in courses:
        values = np.asarray(course, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size and not str(label).startswith("_"):
            first, last, highest = (number(float(value)) for value in (values[0], values[-1], values.max()))
            same = np.ptp(values) == 0
            parts.append(f"{label} {first}" if same else f"{label} from {first} to {last}, at most {highest}")
    return f"{title}. By update: {'; '.join(parts)}." if parts else f"{title}."


def write(figures: Sequence[Drawn], folder: Path) -> None:
    """Write NAME.svg, NAME-dark.svg (both without a background) and NAME.png (on white) for each figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        for ending, content in ((".svg", figure.svg), ("-dark.svg", figure.dark), (".png", figure.png)):
            write_atomically(folder / f"{figure.name}{ending}", content)
