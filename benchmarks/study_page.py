"""Tables and figures of `benchmarks/study.py`, from the files of its finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_trustkl.compare.metrics import spread
from trl_trustkl.compare.settings import CORNERS
from trl_trustkl.files import write_atomically
from trl_trustkl.report import figures as shared
from trl_trustkl.report.series import largest, mean
from trl_trustkl.report.text import count, number, percent

Run = dict[str, Any]

COLOURS = {"plain": shared.RED, "max_kl": shared.BLUE, "max_kl, lr_target": shared.GREEN}
CORNER_COLOURS = dict(zip(CORNERS, (shared.BLUE, shared.ORANGE, shared.GREEN, shared.RED), strict=True))
EQUAL_KLS = (2.0, 5.0, 10.0)
"""Nats per response at which scores are compared."""
LESS_LIKELY = 3.0
"""Nats per token below the start at which text counts as collapsed."""


def read(data: Path) -> list[Run]:
    """The finished runs, by setting and seed."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(data.glob("*/*.json"))]
    return sorted(runs, key=lambda run: (run["experiment"], run["seed"]))


def of(runs: Iterable[Run], experiment: str) -> dict[str, list[Run]]:
    """The runs of an experiment by their settings."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run["experiment"] == experiment:
            found.setdefault(run["setting"], []).append(run)
    return found


def collapsed(run: Run) -> bool:
    """By the definition in study.py."""
    before, after = run["held_out"]["before"], run["held_out"]["after"]
    return bool(
        after["score"] < before["score"]
        or after["distinct_2"] < before["distinct_2"] / 2
        or not after["ref_logp"] >= before["ref_logp"] - LESS_LIKELY  # NaN too
    )


def curve(run: Run, key: str) -> Any:
    return np.array([math.nan if value is None else value for value in run["curves"][key]], dtype=np.float64)


def score_at(run: Run, kl: float) -> float:
    """The score at the first update whose KL to the reference is at least `kl`, mean over it and its two neighbours; NaN if the
    KL stayed below."""
    reached = np.nonzero(curve(run, "anchor.kl_exact") >= kl)[0]
    if not len(reached):
        return math.nan
    first = int(reached[0])
    return mean(curve(run, "score")[max(0, first - 1) : first + 2])


def held_out(key: str) -> Callable[[Run], float]:
    return lambda run: float(run["held_out"]["after"][key])


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Run], float]] = {
    "held-out score": held_out("score"),
    "KL to the reference": held_out("kl"),
    "distinct-2": held_out("distinct_2"),
    "log π_ref": held_out("ref_logp"),
    "largest update": lambda run: largest(curve(run, "trust.kl")),
    "largest proposed": lambda run: largest(curve(run, "trust.kl_proposed")),
}
EXPLANATION = """
Mean ± sample standard deviation over the seeds, on 32 completions of 16 held-out prompts after the run. KL to the reference
in nats per response; log π_ref and updates (KL(π_old‖π); proposed: before the limit) in nats per token. Collapsed: the score
fell below that before the run, or half of the distinct pairs of words were lost, or log π_ref fell by more than 3.
"""


def cell(values: Iterable[float]) -> str:
    """Mean ± standard deviation of the finite values, and how many if some are missing."""
    found = np.array(list(values), dtype=np.float64)
    known = found[np.isfinite(found)]
    if not known.size:
        return "–"
    if known.size == found.size == 1:
        return number(mean(known))
    some = "" if known.size == found.size else f" ({known.size} of {found.size})"
    return f"{number(mean(known))} ± {number(spread(known), 2)}{some}"


def table(settings: dict[str, list[Run]], columns: dict[str, Callable[[Run], float]]) -> str:
    heads = ["setting", "seeds", *columns, "collapsed"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in settings.items():
        cells = [cell(map(each, runs)) for each in columns.values()]
        lines.append(f"| {' | '.join([name, str(len(runs)), *cells, percent(np.mean([*map(collapsed, runs)]))])} |")
    return "\n".join(lines)


def mechanisms_table(runs: list[Run]) -> str:
    """How many times as large an update would have been without each mechanism, over all attributed updates."""
    lines = ["| mechanism | updates | without it, times as large: median (quartiles) |", "|---|---|---|"]
    for name, values in factors(runs).items():
        low, middle, high = (number(float(np.quantile(values, level))) for level in (0.25, 0.5, 0.75))
        lines.append(f"| {name} | {len(values)} | {middle} ({low} to {high}) |")
    return "\n".join(lines)


def factors(runs: list[Run]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for run in runs:
        for kl, without in zip(run["curves"]["trust.kl"], run["curves"]["counterfactual"], strict=True):
            for name, other in (without or {}).items():
                if kl and other is not None:
                    found.setdefault(name, []).append(other / kl)
    return {name: np.array(values) for name, values in found.items()}


# -- figures -----------------------------------------------------------------------------------------------------------


def learning_rate_figure(settings: dict[str, list[Run]], ink: str) -> Figure:
    """The held-out score over the learning rate, a line for each arm, and below it the share of runs that collapsed."""
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for arm, colour in COLOURS.items():
        of_arm = {
            run[0]["made_with"]["config"]["learning_rate"]: run for name, run in settings.items() if arm_of(name) == arm
        }
        rates = sorted(of_arm)
        scores = [np.array([*map(COLUMNS["held-out score"], of_arm[rate])]) for rate in rates]
        middle, by = (
            np.array([each.mean() for each in scores]),
            np.array([np.nan_to_num(spread(each)) for each in scores]),
        )
        above.plot(rates, middle, "o-", color=colour, label=arm, linewidth=1.8)
        above.fill_between(rates, middle - by, middle + by, color=colour, alpha=0.18, linewidth=0)
        below.plot(
            rates, [np.mean([*map(collapsed, of_arm[rate])]) for rate in rates], "o-", color=colour, linewidth=1.8
        )
    above.set_xscale("log")
    above.set_ylabel("held-out score")
    above.legend(frameon=False, labelcolor=ink)
    below.set_ylim(-0.05, 1.05)
    below.set_ylabel("collapsed")
    below.set_xlabel("learning rate")
    return inked(figure, ink)


def arm_of(setting: str) -> str:
    return setting.rpartition(", ")[0]


def corners_figure(settings: dict[str, list[Run]], ink: str) -> Figure:
    """The KL to the reference over the updates: the mean over the seeds, and the range of them."""
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in CORNER_COLOURS.items():
        if not (runs := settings.get(name)):
            continue
        curves = np.array([curve(run, "anchor.kl_exact") for run in runs])
        updates = np.arange(1, curves.shape[1] + 1)
        axes.plot(updates, curves.mean(0), color=colour, label=name, linewidth=1.8)
        axes.fill_between(updates, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("update")
    axes.set_ylabel("KL to the reference\n(nats per response)")
    axes.legend(frameon=False, labelcolor=ink)
    return inked(figure, ink)


def inked(figure: Figure, ink: str) -> Figure:
    """Axes, ticks and labels in one colour, on a transparent ground."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=ink, which="both")
        for part in (axes.xaxis.label, axes.yaxis.label):
            part.set_color(ink)
        for side, line in axes.spines.items():
            line.set_color(ink)
            line.set_visible(side in ("left", "bottom"))
    return figure


def save(figure: Figure, path: Path) -> None:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())


# -- all of it ---------------------------------------------------------------------------------------------------------

FIGURES = {"learning_rate": learning_rate_figure, "four_corners": corners_figure}


def write(data: Path, figures: Path, *, limit: float) -> str:
    """Write study.md beside the data and the figures in light and dark; returns the text."""
    runs = read(data)
    parts = [f"{count(len(runs), 'run')}. {' · '.join(sorted({run['machine'] for run in runs}))}."]
    if settings := of(runs, "learning_rate"):
        settings = dict(sorted(settings.items(), key=lambda each: learning_rate(each[1])))
        equal = {f"score at a KL of {kl:g}": (lambda run, kl=kl: score_at(run, kl)) for kl in EQUAL_KLS}
        parts += [
            f"**GRPO, learning rate × trust region** (max_kl={limit:g})",
            table(settings, COLUMNS),
            EXPLANATION.strip(),
        ]
        parts += ["Training scores at equal KL to the reference", table(settings, equal)]
    if settings := of(runs, "four_corners"):
        parts += ["**PPO, anchor × trust region**", table(settings, COLUMNS)]
    if settings := of(runs, "mechanisms"):
        parts += [
            "**PPO, without each mechanism**",
            mechanisms_table([run for each in settings.values() for run in each]),
        ]
    for name, draw in FIGURES.items():
        if settings := of(runs, name):
            for suffix, ink in (("light", shared.INK), ("dark", shared.INK_ON_DARK)):
                save(draw(settings, ink), figures / f"study_{name}_{suffix}.png")
    text = "\n\n".join(parts) + "\n"
    write_atomically(data / "study.md", text)
    return text


def learning_rate(runs: list[Run]) -> float:
    return float(runs[0]["made_with"]["config"]["learning_rate"])
