"""Findings about outcomes: what the updates would have been without a mechanism, from the records' `counterfactual`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .advice import FEW, Finding, of_updates, set_lr, weaker_anchor
from .schema import Run
from .series import Column, column, factors, geometric_mean, kl_without, largest, mean, shares
from .summary import MECHANISMS
from .text import count, listed, number, percent

INTERVENES = 0.05  # a share of an update from which the limit on the gradient's norm clearly intervened
UNCHANGED = 1e-3  # a KL within this distance of the KL as it was, relative to it, is unchanged
MUCH = 0.2  # a mean share from which the limit, if it shortened the updates at all, would show in their mean KL
ABOUT = 1.1  # a mean KL within a factor of this is about the same
TWICE = 2.0  # the clip at least halves an update that would have been this many times as large without it
FURTHER = 0.9  # an update whose KL would have been less than this multiple of it went further due to the mechanism
MOSTLY = 0.5  # without the anchor, the KL is less than this multiple of it: more than half is due to the anchor
ON_PURPOSE = ("anchor", "lr")  # the anchor has a separate finding; trust_lr_target may raise the learning rate


def _known(values: Column | None) -> Column:
    """The values on record; an empty column if there are too few for a median."""
    found = np.array([]) if values is None else values[np.isfinite(values)]
    return found if len(found) >= FEW else np.array([])


def _without(name: str, values: Column) -> str:
    return (
        f"Without {MECHANISMS[name]}, the KL(π_old‖π) of an update would have been {number(float(np.median(values)))} times as "
        f"large (the median of {count(len(values), 'attributed update')})"
    )


def grad_norm_without_effect(run: Run) -> Finding | None:
    share, factor = shares(run.records)["grad_norm"], factors(run.records).get("grad_norm")
    if factor is None:
        return None
    limited: NDArray[np.bool_] = (share >= INTERVENES) & np.isfinite(factor)
    if not limited.any():
        return None
    change, average, scaled = np.abs(factor[limited] - 1), geometric_mean(factor[limited]), mean(share[limited])
    if (change <= UNCHANGED).all():
        outcome = f"differed by at most {number(100 * largest(change), 2)} %"
    elif limited.sum() >= FEW and scaled >= MUCH and 1 / ABOUT <= average <= ABOUT:
        outcome = f"been {number(average)} times as large on average (geometric mean)"
    else:
        return None
    return Finding(
        "grad_norm_without_effect",
        "The limit on the gradient's norm does not shorten the updates",
        f"In {of_updates(limited[np.isfinite(factor)], 'attributed update')}, the limit scaled the gradient down, by "
        f"{percent(scaled)} on average. Without it, the KL(π_old‖π) of these updates would have {outcome}: an optimizer that "
        "rescales gradients itself, such as AdamW, undoes the scaling.",
        "Set max_grad_norm=0, or keep the limit for single gradients that are much larger than the others.",
    )


def clip_halves_updates(run: Run) -> Finding | None:
    factor = _known(factors(run.records).get("clip"))
    if not factor.size or np.median(factor) < TWICE:
        return None
    shorter = 1 / math.sqrt(np.median(factor))  # the KL grows with the square of the distance, to leading order
    epochs = column(run.records, "trust.epochs")
    planned = math.ceil(largest(epochs)) if np.isfinite(epochs).any() else 1
    fewer = max(1, round(planned * shorter))
    return Finding(
        "clip_halves_updates",
        "The clip halves the updates, or more",
        f"{_without('clip', factor)}: steps are spent on gradients that the clip removes.",
        f"Set num_ppo_epochs={fewer} instead of {planned}: fewer steps reach an update of about the same size."
        if fewer < planned
        else set_lr(run, shorter, f"{number(shorter, 2)} times the present one")
        + ", so that the clip has less to remove.",
    )


def updates_go_further(run: Run) -> Finding | None:
    medians = {name: _known(values) for name, values in factors(run.records).items() if name not in ON_PURPOSE}
    further = [name for name, values in medians.items() if values.size and np.median(values) < FURTHER]
    if not further:
        return None
    least = min(further, key=lambda name: float(np.median(medians[name])))
    kl = kl_without(run.records)[least]
    return Finding(
        "updates_go_further",
        f"Updates go further because of {listed([MECHANISMS[name] for name in further])}",
        ". ".join(_without(name, medians[name]) for name in further)
        + ". A mechanism lets an update go further if what it removes pulled against the rest of the update.",
        f"Set trust_max_kl={number(float(np.nanmedian(kl)), 2)} (nats per token), the median KL without "
        f"{MECHANISMS[least]}: this limit is enforced.",
    )


def anchor_pulls_more_than_reward(run: Run) -> Finding | None:
    factor = _known(factors(run.records).get("anchor"))
    if not factor.size or np.median(factor) >= MOSTLY:
        return None
    return Finding(
        "anchor_pulls_more_than_reward",
        "Most of an update is due to the anchor",
        f"{_without('anchor', factor)}: more than half of it is due to the anchor's pull, not to the reward.",
        weaker_anchor(run),
    )
