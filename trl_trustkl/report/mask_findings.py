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
    limit = largest(column(run.records, "trust.mask_limit"))
    return Finding(
        "masks_leave_out_most",
        "Response masks leave out most responses",
        f"In {of_updates(over)}, more than half of the responses were left out of the loss, {percent(mean(left_out))} on "
        f"average: a token of each had a KL above response_mask_kl, {number(limit)} nats. The later steps of an update "
        "are made with the few others.",
        set_lr(run, 1 / 2, "half of the present one") + ", or a larger response_mask_kl.",
    )


def masks_act_too_late(run: Run) -> Finding | None:
    limit, left_out = column(run.records, "trust.mask_limit"), column(run.records, "trust.masked_responses")
    beyond = column(run.records, "trust.kl_max") > limit
    if np.isfinite(limit).sum() < FEW or not (left_out == 0).all() or beyond.mean() <= MOST:
        return None
    return Finding(
        "masks_act_too_late",
        "Response masks never left out a response",
        f"In {of_updates(beyond)}, a token ended above response_mask_kl, {number(largest(limit))} nats, up to "
        f"{number(largest(column(run.records, 'trust.kl_max')))}, but no response was left out in "
        f"{count(len(run.records), 'update')}: a mask acts on the steps that follow, and these updates went that far in their "
        "last step.",
        f"{set_limit(run, largest(limit), 'max_kl_token')}, which is enforced after the last step; or set num_ppo_epochs=2, so "
        "that there are steps that follow.",
    )
