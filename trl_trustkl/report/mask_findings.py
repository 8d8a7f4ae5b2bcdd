"""Findings about response masks: whether they leave out too many responses, or act too late."""

from __future__ import annotations

import numpy as np

from .advice import FEW, Finding, of_updates, set_limit, set_lr
from .schema import Run
from .series import column, largest, mean
from .text import count, number, percent

MOST = 0.5  # a share of the responses from which most of the batch is wasted


def masks_leave_out_most(run: Run) -> Finding | None:
    left_out = column(run.records, "trust.masked_responses")
    over = left_out > MOST
    if np.isfinite(left_out).sum() < FEW or mean(left_out) <= MOST:
        return None
    limit, sampler = largest(column(run.records, "trust.mask_limit")), column(run.records, "sampler.kl")
    if _sampled_elsewhere(run):
        measured = "an estimated KL from the sampler's distribution"
        note = f"The sampler and the training pass differ by {number(mean(sampler))} nats per token."
        advice = (
            f"Set response_mask_kl={number(2 * limit, 2)}, twice the present one, above the mismatch with the sampler."
        )
    else:
        measured, note = "a KL", "The later steps of an update are made with the few others."
        advice = set_lr(run, 1 / 2, "half of the present one") + ", or a larger response_mask_kl."
    return Finding(
        "masks_leave_out_most",
        "Response masks leave out most responses",
        f"In {of_updates(over)}, more than half of the responses were left out of the loss, {percent(mean(left_out))} on "
        f"average: a token of each had {measured} above response_mask_kl, {number(limit)} nats. {note}",
        advice,
    )


def masks_act_too_late(run: Run) -> Finding | None:
    limit, left_out = column(run.records, "trust.mask_limit"), column(run.records, "trust.masked_responses")
    beyond = column(run.records, "trust.kl_max") > limit
    if np.isfinite(limit).sum() < FEW or not (left_out == 0).all() or beyond.mean() <= MOST or _sampled_elsewhere(run):
        return None
    once = (column(run.records, "trust.epochs") <= 1).all()
    return Finding(
        "masks_act_too_late",
        "Response masks never left out a response",
        f"In {of_updates(beyond)}, a token ended above response_mask_kl, {number(largest(limit))} nats, up to "
        f"{number(largest(column(run.records, 'trust.kl_max')))}, but no response was left out in "
        f"{count(len(run.records), 'update')}: a mask acts on the steps that follow, and no step with such a response "
        "followed.",
        f"{set_limit(run, largest(limit), 'max_kl_token')}, which is enforced after the last step"
        + ("; or set num_ppo_epochs=2, so that each response has a step that follows." if once else "."),
    )


def _sampled_elsewhere(run: Run) -> bool:
    """Whether another engine sampled, whose log-probabilities response masks compare with."""
    engines = {record.rollout.engine for record in run.records if record.rollout is not None}
    return bool(engines - {"TransformersEngine"})
