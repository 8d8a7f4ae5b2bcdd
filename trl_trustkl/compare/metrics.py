"""The metrics of a run, from its records and completions; those of a setting are the mean and spread over its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..report.schema import Run
from ..report.series import Column, column, largest, mean, of_groups, reference_per_token
from ..report.text import number
from .settings import LIMIT


class Metric(NamedTuple):
    """title: the head of its column; unit: "" for a pure number; how: how it is computed, with {last} for "last 5 updates"
    and {limit} for the limit; style: the format of its numbers, by default three significant digits."""

    title: str
    unit: str
    how: str
    style: str = ""


METRICS: dict[str, Metric] = {
    "score_first": Metric("score at the start", "", "mean over the first updates, as many as for the score", ".2f"),
    "score": Metric("score", "", "mean over the {last}", ".2f"),
    "kl": Metric(
        "KL to the reference", "nats/response", "exact KL(π‖π_ref) at rollout, mean over the {last}"
    ),
    "update_kl": Metric("largest update KL", "nats/token", "largest KL(π_old‖π) of one update in the run"),
    "over_limit": Metric(
        "updates over the limit", "", "share of the updates whose KL(π_old‖π) exceeded {limit} nats/token", ".0%"
    ),
    "ratio": Metric("largest ratio", "", "largest π/π_old at a sampled token in the run"),
    "ref_logp": Metric(
        "reference log-likelihood", "nats/token", "log π_ref of the completions, mean over the {last}", ".2f"
    ),
    "distinct_1": Metric("distinct-1", "", "share of distinct words in the completions of the {last}", ".2f"),
    "distinct_2": Metric(
        "distinct-2", "",
        "share of distinct pairs of successive words in the completions of the {last} (Li et al., arXiv 1510.03055)", ".2f",
    ),
}  # fmt: skip


class Result(NamedTuple):
    """The metrics of a setting.

    config: the fields it was made with. anchored, clipped: whether an anchor and a clip rule were on, and could act, according
    to the records. clip_end: the upper end of the clip range, None without PPO's clip. rows: its metrics by seed; runs: their
    source.
    """

    name: str
    config: Mapping[str, Any]
    anchored: bool
    clipped: bool
    clip_end: float | None
    rows: dict[int, dict[str, float]]
    runs: dict[int, Run]

    def values(self, metric: str) -> Column:
        """One number for each seed."""
        return np.array([row[metric] for row in self.rows.values()], dtype=np.float64)


def result(name: str, config: Mapping[str, Any], runs: dict[int, Run], *, last: int, limit: float = LIMIT) -> Result:
    """The result of a setting from its runs by seed, at least one."""
    records = [record for run in runs.values() for record in run.records]
    trust = records[-1].trust
    # With one step for each batch, TRL's default, the ratio is 1 when the loss of GRPO and RLOO is computed.
    inert = of_groups(records) and not any(record.trust.gated > 0 for record in records)
    return Result(
        name,
        config,
        anchored=any(record.anchor.coef > 0 for record in records),
        clipped=trust.rule != "none" and not inert,
        clip_end=1 + trust.high if trust.rule == "ppo" and not inert else None,
        rows={seed: of_run(run, last=last, limit=limit) for seed, run in runs.items()},
        runs=runs,
    )


def last_updates(updates: int) -> int:
    """How many updates are "the last" by default: a quarter."""
    return max(1, updates // 4)


def latest(last: int) -> str:
    """ "last update", "last 5 updates"."""
    return "last update" if last == 1 else f"last {last} updates"


@np.errstate(all="ignore")  # numbers near the largest float overflow, and are shown as missing
def of_run(run: Run, *, last: int, limit: float = LIMIT) -> dict[str, float]:
    """Every metric of METRICS; NaN for one that does not follow from the records."""
    records = run.records
    kl = column(records, "trust.kl")
    known = kl[np.isfinite(kl)]
    recent = {record.update for record in records[-last:]}
    at, ref_logp = reference_per_token(run)
    texts = [row.completion for row in run.completions if row.update in recent]
    return {
        "score_first": mean(column(records[:last], "score")),
        "score": mean(column(records[-last:], "score")),
        "kl": mean(column(records[-last:], "anchor.kl_exact")),
        "update_kl": largest(kl),
        "over_limit": float((known > limit).mean()) if known.size else math.nan,
        "ratio": largest(column(records, "trust.max_ratio")),
        "ref_logp": mean(ref_logp[np.isin(at, list(recent))]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among those of all texts (Li et al., arXiv 1510.03055); NaN if there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def spread(values: Column) -> float:
    """Sample standard deviation (n − 1) of the finite values; NaN for fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if known.size > 1 else math.nan


def shown(metric: str, value: float) -> str:
    """A value as text; "–" for one that is missing."""
    style = METRICS[metric].style
    return format(value, style) if style and math.isfinite(value) else number(value)
