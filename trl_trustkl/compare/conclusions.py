"""One paragraph from the numbers, by rule: no sentence says more than they do.

With two seeds or more, two settings are told apart by a metric where their means differ by more than two pooled standard
deviations and their ranges do not overlap. Metrics that run over orders of magnitude are compared by their logarithms. With
one seed there is no spread: then a difference of a tenth is told as what this seed showed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..report.series import Column, mean
from ..report.text import number
from .metrics import METRICS, Result, latest, shown

APART = 2.0  # pooled standard deviations
TENTH = 0.1  # of the larger number, with one seed
LOGARITHMIC = ("update_kl", "ratio")
WORDS = {1: "higher", -1: "lower", 0: "not clearly different"}
CLIP_FIELDS = ("clip_rule", "clip_kwargs", "cliprange", "cliprange_high")


class Corners(NamedTuple):
    """The four settings of anchor on and off × clip on and off."""

    both: Result
    clip: Result
    anchor: Result
    neither: Result


class Gap(NamedTuple):
    """From one setting to another: `sign` of the difference where they are told apart, otherwise 0; `sds`: the difference
    in pooled standard deviations, None where a side has fewer than two seeds."""

    sign: int
    sds: float | None

    def __str__(self) -> str:
        return "" if self.sds is None or not math.isfinite(self.sds) else f", {self.sds:.1f} SD"


@np.errstate(all="ignore")  # numbers near the largest float are compared as well as they can be
def conclude(results: Sequence[Result], *, last: int) -> str:
    """The paragraph."""
    found = corners(results)
    sentences = [basis(results, last)]
    if len(results) > 1:
        sentences += [told_apart(results, metric) for metric in ("score", "kl", "update_kl")]
    if found is not None:
        sentences += [*without_anchor(found), *without_clip(found), division_of_labour(found)]
    sentences.append(clip_and_ratio(results))
    return " ".join(sentence for sentence in sentences if sentence)


def basis(results: Sequence[Result], last: int) -> str:
    """What the numbers are means of, and when two settings are told apart."""
    seeds = [len(result.rows) for result in results]
    over = f"Score, KL to the reference and likelihood are means over the {latest(last)}"
    if min(seeds) < 2:
        few = "one seed" if max(seeds) == 1 else "one seed for some settings"
        return (
            f"{over}, of {few}: without a spread to hold a difference against, this is what these runs showed, not what "
            "others will, and what differs by less than a tenth is not spoken of as different."
        )
    number_of = f"{min(seeds)} seeds" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)} seeds"
    return (
        f"{over} and over {number_of}. Two settings are told apart where their means differ by more than "
        f"{APART:g} standard deviations (SD, pooled over the two; of the logarithm for update KL and ratio) and their ranges "
        "do not overlap."
    )


def gap(first: Result, second: Result, metric: str) -> Gap | None:
    """From `first` to `second`; None where one of them lacks the metric."""
    a, b = (_known(result, metric) for result in (first, second))
    difference = mean(b) - mean(a)
    if not math.isfinite(difference):
        return None
    if min(a.size, b.size) < 2:
        ends = [mean(result.values(metric)) for result in (first, second)]
        told = abs(ends[1] - ends[0]) > TENTH * max(map(abs, ends))
        return Gap(int(np.sign(difference)) if told else 0, None)
    pooled = math.sqrt(
        (a.var(ddof=1) * (a.size - 1) + b.var(ddof=1) * (b.size - 1)) / (a.size + b.size - 2)
    )  # fmt: skip
    sds = abs(difference) / pooled if pooled > 0 else math.inf if difference else 0.0
    told = sds > APART and (a.max() < b.min() or b.max() < a.min())
    return Gap(int(np.sign(difference)) if told else 0, sds)


def _known(result: Result, metric: str) -> Column:
    values = result.values(metric)
    values = values[np.isfinite(values)]
    return np.log(values[values > 0]) if metric in LOGARITHMIC else values


# -- which settings differ ---------------------------------------------------------------------------------------------


def told_apart(results: Sequence[Result], metric: str) -> str:
    """How many pairs are told apart by a metric, and which two are farthest apart."""
    gaps = {(a.name, b.name): found for a, b in combinations(results, 2) if (found := gap(a, b, metric)) is not None}
    if not gaps:
        return ""
    title = METRICS[metric].title
    apart = "told apart" if all(found.sds is not None for found in gaps.values()) else "a tenth or more apart"
    means = {result.name: mean(result.values(metric)) for result in results if _known(result, metric).size}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    told = sum(found.sign != 0 for found in gaps.values())
    if not told:
        return f"By {title}, no two settings are {apart} ({_values(metric, means[low], means[high], ' to ')})."
    widest = gaps.get((low, high)) or gaps[high, low]
    pairs = f"{told} of {len(gaps)} pairs of settings are {apart}" if len(gaps) > 1 else f"the two are {apart}"
    if not widest.sign:
        return f"By {title}, {pairs}."
    return (
        f"By {title}, {pairs}: it was highest with {high} ({shown(metric, means[high])}) and lowest with {low} "
        f"({shown(metric, means[low])}){widest}."
    )


# -- what taking a mechanism away did ----------------------------------------------------------------------------------


def corners(results: Sequence[Result]) -> Corners | None:
    """The 2 × 2 of anchor and clip, where the settings are one and differ in nothing else."""
    at = {(result.anchored, result.clipped): result for result in results}
    if len(results) != 4 or len(at) != 4:
        return None
    found = Corners(at[True, True], at[False, True], at[True, False], at[False, False])
    alike = (
        _alike(results, lambda field: not _of_anchor(field) and field not in CLIP_FIELDS)
        and _alike((found.both, found.anchor), _of_anchor)
        and _alike((found.both, found.clip), CLIP_FIELDS.__contains__)
    )
    return found if alike else None


def _of_anchor(field: str) -> bool:
    return field.startswith("kl_")


def _alike(results: Sequence[Result], concerns: Any) -> bool:
    def part(config: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in config.items() if concerns(field)}

    return all(part(result.config) == part(results[0].config) for result in results)


def without_anchor(of: Corners) -> list[str]:
    """What changed where the anchor was taken away, with the clip and without it."""
    return _without("the anchor", ("kl", "ref_logp", "score"), (of.both, of.clip), (of.anchor, of.neither), "the clip")


def without_clip(of: Corners) -> list[str]:
    """What changed where the clip was taken away, with the anchor and without it."""
    return _without(
        "the clip", ("update_kl", "ratio", "score"), (of.both, of.anchor), (of.clip, of.neither), "the anchor"
    )


def _without(
    mechanism: str, metrics: Sequence[str], on: tuple[Result, Result], off: tuple[Result, Result], other: str
) -> list[str]:
    """A sentence for each metric that changed, and one for those that did not.

    on, off: the settings (with the mechanism, without it), where the other mechanism is on and where it is off.
    """
    sentences, same = [], []
    for metric in metrics:
        with_other, alone = gap(*on, metric), gap(*off, metric)
        if with_other is None or alone is None:
            continue
        if not with_other.sign and not alone.sign:
            same.append(METRICS[metric].title)
            continue
        begin = f"Without {mechanism} the {METRICS[metric].title} was"
        first, second = _against(metric, *on, with_other), _against(metric, *off, alone)
        if with_other.sign == alone.sign:
            sentences.append(f"{begin} {WORDS[alone.sign]}, with {other} ({first}) and without it ({second}).")
        else:
            sentences.append(
                f"{begin} {WORDS[with_other.sign]} with {other} ({first}), and {WORDS[alone.sign]} without it ({second})."
            )
    if same:
        listed = " and ".join(filter(None, [", ".join(same[:-1]), same[-1]]))
        sentences.append(f"Taking {mechanism} away did not clearly change {listed}.")
    return sentences


def _against(metric: str, with_it: Result, without_it: Result, found: Gap) -> str:
    values = _values(metric, mean(without_it.values(metric)), mean(with_it.values(metric)), " against ")
    return f"{values}{found}" if found.sign else values


def _values(metric: str, first: float, second: float, between: str) -> str:
    unit = METRICS[metric].unit
    return f"{shown(metric, first)}{between}{shown(metric, second)}{' ' + unit if unit else ''}"


def division_of_labour(of: Corners) -> str:
    """Said only where each mechanism made its difference with and without the other."""

    def rose(first: Result, second: Result, metric: str) -> bool:
        found = gap(first, second, metric)
        return found is not None and found.sign > 0

    anchored = rose(of.both, of.clip, "kl") and rose(of.anchor, of.neither, "kl")
    clipped = rose(of.both, of.anchor, "update_kl") and rose(of.clip, of.neither, "update_kl")
    if not (anchored and clipped):
        return ""
    return (
        "So the anchor kept the policy nearer to the reference, and the clip kept updates smaller, each of them with and "
        "without the other."
    )


def clip_and_ratio(results: Sequence[Result]) -> str:
    """Whether PPO's clip held the ratio in its range."""
    clipped = [
        (float(ratios.max()), result)
        for result in results
        if result.clip_end is not None and (ratios := result.values("ratio")[np.isfinite(result.values("ratio"))]).size
    ]
    if not clipped:
        return ""
    beyond = [(ratio, result) for ratio, result in clipped if ratio > (result.clip_end or 0)]
    if not beyond:
        return "No ratio was above the clip's range; the clip does not guarantee it."
    ratio, result = max(beyond, key=lambda entry: entry[0])
    return (
        f"The clip did not hold the ratio in its range: with {result.name} the largest was {number(ratio)}, and the range "
        f"ends at {number(result.clip_end)}."
    )
