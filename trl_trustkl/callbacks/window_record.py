"""The record of a generation batch of GRPO or RLOO, from what TRL logged and what was measured."""

from __future__ import annotations

import math
from typing import Any

from .. import bounds, records
from ..certificate import certificate
from ..records import AnchorRecord, BoundRecord, TrustRecord
from ..rollout.reward_log import RESERVED, as_json, free_name
from ..trl_compat import trl_logs
from ..trl_compat.trl_logs import Kind
from ..types import Enforcement, Measurement
from .window import Window


def window_record(
    kind: Kind,
    args: Any,
    window: Window,
    *,
    update: int,
    target: float | None,
    rescaled: bool = True,
    grad_norm: float | None = None,
    anchor_limit: float | None = None,
) -> BoundRecord:
    """The record of a window that was measured and enforced.

    TRL's metrics are averaged over the window's passes. update: optimizer steps made. target: of the controller of β, nats
    per token. rescaled: whether the optimizer rescales gradients. grad_norm: of the window's only step, before clipping; None
    where it is unknown. anchor_limit: `anchor_max_kl`.
    """
    enforcement, _ = enforced(window)
    record = trl_logs.record_of_update(kind, args, _logs(window, target, grad_norm), update=update, rescaled=rescaled)
    trust, anchor = _trust(record.trust, args, window), _anchor(record.anchor, window, anchor_limit)
    shares = {
        "anchor": 0.0 if window.coef == 0 else math.nan,
        "clip": trust.gated,
        "stop": window.dropped_steps / window.steps,
        "backtrack": 0.0 if trust.scale is None else 1.0 - trust.scale,
        "grad_norm": 1.0 - record.gradient.scale,
        "lr": max(0.0, 1.0 - window.lr_factor),
    }
    return record._replace(
        lr=window.lr * window.lr_factor,
        refused=enforcement.rejected,
        seconds={"measure": window.seconds, "total": window.step_seconds + window.seconds},
        anchor=anchor,
        trust=trust,
        shares=None
        if enforcement.rejected is not None
        else {name: s for name, s in shares.items() if not math.isnan(s)},
        binding="none" if enforcement.rejected is not None else trl_logs.binding(shares, rescaled=rescaled),
    )


def _trust(record: TrustRecord, args: Any, window: Window) -> TrustRecord:
    """What was measured and enforced, in the place of what TRL logged."""
    enforcement, measured = enforced(window)
    trust = record._replace(
        epochs=window.epochs, stopped=window.dropped_steps > 0,
        scale=enforcement.scale, tries=enforcement.tries, limit=enforcement.limit,
        limit_token=enforcement.limit_token, limit_response=enforcement.limit_response, decided=enforcement.decided,
    )  # fmt: skip
    if measured.tokens:
        held = bounds.guarantees(measured, enforcement)
        trust = trust._replace(
            kl=measured.kl, kl_max=measured.kl_max, kl_response_max=measured.kl_response_max,
            kl_proposed=enforcement.kl_proposed, tv=measured.tv, max_ratio=measured.max_ratio,
            ratio_quantiles=measured.ratio_quantiles, guaranteed=held.mean,
            guaranteed_token=held.token, guaranteed_response=held.response,
        )  # fmt: skip
    if enforcement.rejected is None:
        horizon = args.max_completion_length or 1  # TRL's None is no limit: that of the batch
        trust = trust._replace(certificate=certificate(window.scores, measured, horizon=horizon))
    return trust


def _anchor(record: AnchorRecord, window: Window, limit: float | None) -> AnchorRecord:
    """The exact KL to the reference, in the place of TRL's estimate."""
    enforcement, measured = enforced(window)
    anchor = record._replace(coef=window.coef, limit=limit)
    if window.anchor is not None:
        return anchor._replace(
            kl=window.anchor.kl, kl_exact=window.anchor.kl_exact, kl_stderr=window.anchor.kl_stderr,
            kl_per_token=window.anchor.kl_per_token, kl_after=measured.anchor_kl,
            guaranteed=bounds.guarantees(measured, enforcement).anchor,
        )  # fmt: skip
    return anchor if measured.tokens else anchor._replace(kl=math.nan, kl_per_token=math.nan)


def enforced(window: Window) -> tuple[Enforcement, Measurement]:
    """The window's enforcement, and the batch after it."""
    assert window.enforcement is not None and window.enforcement.measured is not None
    return window.enforcement, window.enforcement.measured


def _logs(window: Window, target: float | None, grad_norm: float | None) -> dict[str, float | None]:
    """What TRL would log of the window's passes alone: the mean of each metric, None where every value is NaN."""
    logs: dict[str, float | None] = {trl_logs.TARGET: target, trl_logs.COEF: window.coef, "grad_norm": grad_norm}
    for name, values in window.metrics.items():
        known = [value for value in values if not math.isnan(value)]
        logs.setdefault(name, sum(known) / len(known) if known else None)
    return logs


def completion_rows(window: Window, update: int) -> list[dict[str, Any]]:
    """The rows of `completions.jsonl`. TRL keeps no likelihood of a row under the reference."""
    rows: list[dict[str, Any]] = []
    for each in window.completions:
        row = {
            "update": update, "prompt": each.prompt, "completion": each.completion, "score": each.score,
            "ref_logp": None, "rewards": each.rewards,
        }  # fmt: skip
        for column, value in each.extra.items():
            row[free_name(str(column), {*RESERVED, *row})] = as_json(value)
        rows.append(records.as_dict(row))
    return rows


def tracked(record: BoundRecord) -> dict[str, float]:
    """The numbers of the anchor and the trust region, by the names under which they are logged."""
    return {
        name: float(value)
        for name, value in records.flatten(record).items()
        if name.startswith(("trust/", "anchor/")) and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
