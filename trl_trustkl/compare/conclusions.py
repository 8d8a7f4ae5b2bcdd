"""The conclusions of a comparison in one paragraph, made by rule from the numbers.

With two seeds or more, two settings differ clearly in a metric if their means differ by more than two pooled standard
deviations and their ranges do not overlap. Metrics that span orders of magnitude are compared by their logarithms. With one
seed there is no spread; a difference of more than a tenth is then reported as what this seed showed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..report.series import Column, largest, mean
from ..report.text import listed, number
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
    """The difference from one setting to another: its `sign`, 0 unless they differ clearly, and its size in pooled standard
    deviations, None if a side has fewer than two seeds."""

    sign: int
    sds: float | None

    def __str__(self) -> str:
        return "" if self.sds is None or not math.isfinite(self.sds) else f", {self.sds:.1f} SD"


@np.errstate(all="ignore")  # numbers near the largest float overflow
def conclude(results: Sequence[Result], *, last: int) -> str:
    found = corners(results)
    sentences = [basis(results, last)]
    if len(results) > 1:
        sentences += [clear_differences(results, metric) for metric in ("score", "kl", "update_kl")]
    if found is not None:
        both, clip, anchor, neither = found
        sentences += without("the anchor", ("kl", "ref_logp", "score"), (both, clip), (anchor, neither), "the clip")
        sentences += without("the clip", ("update_kl", "ratio", "score"), (both, anchor), (clip, neither), "the anchor")
        sentences.append(separate_effects(found))
    sentences.append(clip_and_ratio(results))
    return " ".join(filter(None, sentences))


def basis(results: Sequence[Result], last: int) -> str:
    """What the numbers are means of, and when two settings differ clearly."""
    seeds = [len(result.rows) for result in results]
    over = f"Score, KL to the reference and likelihood are means over the {latest(last)}"
    if min(seeds) < 2:
        few = "one seed" if max(seeds) == 1 else "one seed for some settings"
        return (
            f"{over}, of {few}: without a spread over seeds, other runs may give other results, and differences below a tenth "
            "are not reported."
        )
    number_of = f"{min(seeds)} seeds" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)} seeds"
    return (
        f"{over} and over {number_of}. Two settings differ clearly if their means differ by more than {APART:g} standard "
        "deviations (SD, pooled over the two; of the logarithm for update KL and ratio) and their ranges do not overlap."
    )


def gap(first: Result, second: Result, metric: str) -> Gap | None:
    """The difference of a metric from `first` to `second`; None if one of them lacks it."""
    a, b = (_known(result, metric) for result in (first, second))
    difference = mean(b) - mean(a)
    if not math.isfinite(difference):
        return None
    if min(a.size, b.size) < 2:
        sds = None
        ends = [mean(result.values(metric)) for result in (first, second)]
        clear = abs(ends[1] - ends[0]) > TENTH * max(map(abs, ends))
    else:
        pooled = math.sqrt((a.var(ddof=1) * (a.size - 1) + b.var(ddof=1) * (b.size - 1)) / (a.size + b.size - 2))
        sds = abs(difference) / pooled if pooled > 0 else math.inf if difference else 0.0
        clear = sds > APART and (a.max() < b.min() or b.max() < a.min())
    return Gap(int(np.sign(difference)) if clear else 0, sds)


def _known(result: Result, metric: str) -> Column:
    values = result.values(metric)
    values = values[np.isfinite(values)]
    return np.log(values[values > 0]) if metric in LOGARITHMIC else values


def clear_differences(results: Sequence[Result], metric: str) -> str:
    """How many pairs of settings differ clearly in a metric, and which two are farthest apart."""
    gaps = {(a.name, b.name): found for a, b in combinations(results, 2) if (found := gap(a, b, metric)) is not None}
    if not gaps:
        return ""
    differ = "differ clearly" if all(found.sds is not None for found in gaps.values()) else "differ by a tenth or more"
    means = {result.name: mean(result.values(metric)) for result in results if _known(result, metric).size}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    clear = sum(found.sign != 0 for found in gaps.values())
    title = METRICS[metric].title
    zero = [result.name for result in results if result.name not in means and np.any(result.values(metric) == 0)]
    apart = f" It is 0 with {listed(zero)}." if zero else ""
    if not clear:
        return f"In {title}, no two settings {differ} ({_values(metric, means[low], means[high], ' to ')}).{apart}"
    text = (
        f"In {title}, {f'{clear} of {len(gaps)} pairs of settings' if len(gaps) > 1 else 'the two settings'} {differ}"
    )
    widest = gaps.get((low, high)) or gaps[high, low]
    if widest.sign:
        text += f": it was highest with {high} ({shown(metric, means[high])}) and lowest with {low} "
        text += f"({shown(metric, means[low])}){widest}"
    return f"{text}.{apart}"


# -- what removing a mechanism changed ---------------------------------------------------------------------------------


def corners(results: Sequence[Result]) -> Corners | None:
    """The 2 × 2 of anchor and clip, if these are the settings and they do not differ in anything else."""
    at = {(result.anchored, result.clipped): result for result in results}
    if len(results) != 4 or len(at) != 4:
        return None
    found = Corners(at[True, True], at[False, True], at[True, False], at[False, False])

    def of_anchor(field: str) -> bool:
        return field.startswith("kl_")

    def of_clip(field: str) -> bool:
        return field in CLIP_FIELDS

    others_equal = _equal(results, lambda field: not of_anchor(field) and not of_clip(field))
    same_anchor = _equal((found.both, found.anchor), of_anchor)
    return found if others_equal and same_anchor and _equal((found.both, found.clip), of_clip) else None


def _equal(results: Sequence[Result], concerned: Callable[[str], bool]) -> bool:
    parts = [{field: value for field, value in result.config.items() if concerned(field)} for result in results]
    return all(part == parts[0] for part in parts)


def without(
    mechanism: str, metrics: Sequence[str], on: tuple[Result, Result], off: tuple[Result, Result], other: str
) -> list[str]:
    """A sentence for each metric that changed without a mechanism, and one for those that did not.

    on, off: the settings with and without the mechanism, where the `other` mechanism is on and where it is off.
    """
    sentences, same = [], []
    for metric in metrics:
        with_other, without_other = gap(*on, metric), gap(*off, metric)
        if with_other is None or without_other is None:
            continue
        title = METRICS[metric].title
        if not with_other.sign and not without_other.sign:
            same.append(title)
            continue
        first, second = _change(metric, *on, with_other), _change(metric, *off, without_other)
        word, other_word = WORDS[with_other.sign], WORDS[without_other.sign]
        if word == other_word:
            how = f"{word} both with {other} ({first}) and without it ({second})"
        else:
            how = f"{word} with {other} ({first}), and {other_word} without it ({second})"
        sentences.append(f"Without {mechanism} the {title} was {how}.")
    if same:
        sentences.append(f"Removing {mechanism} did not clearly change {listed(same)}.")
    return sentences


def _change(metric: str, with_it: Result, without_it: Result, found: Gap) -> str:
    values = _values(metric, mean(without_it.values(metric)), mean(with_it.values(metric)), " against ")
    return f"{values}{found}" if found.sign else values


def _values(metric: str, first: float, second: float, between: str) -> str:
    unit = METRICS[metric].unit
    return f"{shown(metric, first)}{between}{shown(metric, second)}{' ' + unit if unit else ''}"


def separate_effects(of: Corners) -> str:
    """A sentence on the separate effects of anchor and clip; empty unless each has its effect with and without the other."""
    anchor = [gap(of.both, of.clip, "kl"), gap(of.anchor, of.neither, "kl")]
    clip = [gap(of.both, of.anchor, "update_kl"), gap(of.clip, of.neither, "update_kl")]
    if not all(found is not None and found.sign > 0 for found in anchor + clip):
        return ""
    return (
        "So the anchor kept the policy nearer to the reference, and the clip kept updates smaller, each with and without the "
        "other."
    )


def clip_and_ratio(results: Sequence[Result]) -> str:
    """Whether PPO's clip kept the ratio in its range."""
    ratios = [
        (largest(each.values("ratio")), each.clip_end, each.name) for each in results if each.clip_end is not None
    ]
    ratios = [each for each in ratios if math.isfinite(each[0])]
    beyond = [(ratio, end, name) for ratio, end, name in ratios if ratio > end]
    if not beyond:
        return "No ratio was above the clip's range; the clip does not guarantee it." if ratios else ""
    ratio, end, name = max(beyond, key=lambda each: each[0])
    return (
        f"The clip did not hold the ratio in its range: with {name} the largest was {number(ratio)}, and the range ends at "
        f"{number(end)}."
    )
