"""Findings about hard limits: which of them shorten the updates, and whether one stops the training."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .advice import FEW, Finding, of_updates, set_limit
from .schema import Run
from .series import column, largest, mean, of_groups
from .text import number, percent

BLOCKED = 0.2  # a share of the updates from which blocked ones slow the training down
TARGET = 0.5  # the share of `anchor_max_kl` that is advised as the controller's target

LIMITS = {
    "trust_max_kl": ("trust.limit", "nats per token"),
    "trust_max_kl_token": ("trust.limit_token", "nats at one token"),
    "trust_max_kl_response": ("trust.limit_response", "nats over one response"),
    "anchor_max_kl": ("anchor.limit", "nats per response from the reference"),
}
"""The hard limits by their fields: the column of each, and its unit in words."""


def limit_decides(run: Run) -> Finding | None:
    made = [record for record in run.records if record.refused is None]
    shortened_by = column(made, "trust.scale") < 1
    if len(made) < FEW or shortened_by.mean() <= 0.5:
        return None
    shortened = [record for record, is_short in zip(made, shortened_by, strict=True) if is_short]
    # Records of earlier versions do not name the limit, as there was one.
    decided = Counter(record.trust.decided or "trust_max_kl" for record in shortened).most_common()
    if decided[0][0] == "anchor_max_kl":
        return None  # it has a separate finding
    by_mean = decided[0][0] == "trust_max_kl"
    target = (
        mean(column(shortened, "trust.limit")) / 2 if by_mean else float(np.nanmedian(column(shortened, "trust.kl")))
    )
    which = ""
    if len(decided) > 1 or not by_mean:
        parts = [
            f"{name} ({number(largest(column(shortened, LIMITS[name][0])))} {LIMITS[name][1]}) {n:,}"
            for name, n in decided
        ]
        which = f" Of these updates, the limit that decided was: {', '.join(parts)}."
    half = "half of the limit" if by_mean else "the median KL of these updates"
    kept = percent(float(np.median(column(shortened, "trust.scale"))))
    return Finding(
        "limit_decides",
        "The limit decides most updates",
        f"Backtracking shortened {of_updates(shortened_by)}, and kept {kept} of the step in the median: the learning rate is "
        "high for this limit. This is harmless, since the limit holds, but each of these updates took "
        f"{number(mean(column(shortened, 'trust.tries')), 2)} further measurements on average.{which}",
        f"{set_limit(run, target, 'lr_target')}, {half} in nats per token: the learning rate then adapts to it.",
    )


def anchor_blocks(run: Run) -> Finding | None:
    made = [record for record in run.records if record.refused is None]
    blocked = np.array([record.trust.decided == "anchor_max_kl" and record.trust.scale == 0 for record in made])
    if blocked.sum() < FEW or blocked.mean() < BLOCKED:
        return None
    limit = largest(column(run.records, "anchor.limit"))
    target = TARGET * limit
    if of_groups(run.records):
        target /= mean(column(run.records, "length"))
        unit = "in nats per token, about half of the limit (with TRL's trainers AdaptiveKLCallback(DualKL(…), trainer))"
    else:
        unit = "in nats per response, half of the limit"
    has_target = np.isfinite(column(run.records, "anchor.target")).any()
    penalty = "The penalty is too weak to prevent this." if has_target else "No penalty with a target lowers the KL."
    return Finding(
        "anchor_blocks",
        "Updates are blocked at the limit of the KL to the reference",
        f"{of_updates(blocked)} changed nothing: the KL to the reference was at its limit of {number(limit)} nats per "
        f"response, and every part of their step would have increased it. {penalty}",
        f'Set kl_controller="dual" and kl_target={number(target, 2)}, {unit}: the penalty then lowers the KL again.',
    )
