"""From what was measured to a record of what bounded an update: gated, measured, guaranteed, binding.

Three words that are never mixed: what a mechanism *gated* (the share of the gradient it removed), what was *measured*
after the step, and what is *guaranteed*: only what backtracking enforced on this very batch.
"""

from __future__ import annotations

from typing import Any

from .divergences import gradient_kind
from .types import (
    AnchorMeasurement,
    AnchorRecord,
    BoundRecord,
    Enforcement,
    GradientRecord,
    Measurement,
    RolloutSummary,
    SamplerRecord,
    TrustRecord,
    UpdateStats,
    ValueRecord,
)

BINDING_THRESHOLD = 0.01
"""A mechanism that took less than this share of an update does not count as having bound it."""


def binding_shares(
    anchor: AnchorMeasurement, stats: UpdateStats, enforcement: Enforcement, lr_factor: float
) -> dict[str, float]:
    """The share of the update each mechanism took, in [0, 1].

    anchor: its share of the absolute advantage. clip: the share of the gradient's weight that the rule gated. penalty:
    Σ λ|w − 1| / Σ (λ|w − 1| + |w·A|), its pull on the sampled tokens against the surrogate's. stop: the share of the
    planned optimizer steps left out. backtrack: 1 − scale. grad_norm: 1 − the mean factor of clipping. lr: 1 − the factor
    that the learning rate by KL put on the scheduled one, where that is below 1.
    """
    left_out = 1.0 - stats.steps / stats.planned_steps if stats.stopped and stats.planned_steps else 0.0
    return {
        "anchor": anchor.share or 0.0,
        "clip": stats.total.gated,
        "penalty": stats.total.penalty,
        "stop": left_out,
        "backtrack": 0.0 if enforcement.scale is None else 1.0 - enforcement.scale,
        "grad_norm": 1.0 - stats.grad_scale,
        "lr": max(0.0, 1.0 - lr_factor),
    }


def binding(shares: dict[str, float]) -> str:
    """The mechanism with the largest share, "none" below 1 %."""
    name = max(shares, key=lambda key: shares[key])
    return name if shares[name] >= BINDING_THRESHOLD else "none"


def guaranteed(measurement: Measurement, enforcement: Enforcement) -> float | None:
    """The bound on the batch's mean KL(π_old‖π) that holds, in nats per token, or None.

    A number only where backtracking enforced a limit on the whole batch: then `measurement.kl` is within it. Its scope is
    the contexts this batch visited.
    """
    if enforcement.limit is None or not measurement.complete or measurement.kl > enforcement.limit:
        return None
    return enforcement.limit


def build_record(
    args: Any,
    *,
    update: int,
    episode: int,
    lr: float,
    lr_factor: float,
    trust_coef: float,
    refused: str | None,
    seconds: dict[str, float],
    rollout: RolloutSummary,
    anchor: AnchorMeasurement,
    stats: UpdateStats,
    measured: Measurement,
    enforcement: Enforcement,
) -> BoundRecord:
    """The record of one update; `args` is the run's configuration (a TrustKLPPOConfig)."""
    return BoundRecord(
        update=update,
        episode=episode,
        score=rollout.score,
        length=rollout.length,
        eos_rate=rollout.eos_rate,
        entropy=rollout.entropy,
        lr=lr,
        refused=refused,
        seconds=seconds,
        anchor=AnchorRecord(
            estimator=args.kl_estimator,
            placement=args.kl_placement,
            gradient=gradient_kind(args.kl_estimator, args.kl_placement),
            target=args.kl_target,
            **anchor._asdict(),
        ),
        trust=_trust_record(args, trust_coef, stats, measured, enforcement),
        value=ValueRecord(
            clip=args.cliprange_value if args.clip_value else None,
            gated=stats.total.value_gated,
            explained_variance=rollout.explained_variance,
        ),
        gradient=GradientRecord(norm=stats.grad_norm, max_norm=args.max_grad_norm or None, scale=stats.grad_scale),
        sampler=SamplerRecord(kl=rollout.sampler_kl),
        binding=binding(binding_shares(anchor, stats, enforcement, lr_factor)),
    )


def _trust_record(
    args: Any, coef: float, stats: UpdateStats, measured: Measurement, enforcement: Enforcement
) -> TrustRecord:
    return TrustRecord(
        rule=args.clip_rule,
        low=args.low,
        high=args.high,
        gated=stats.total.gated,
        gated_low=stats.total.gated_low,
        gated_high=stats.total.gated_high,
        coef=coef,
        epochs=args.num_ppo_epochs * stats.steps / stats.planned_steps,
        stopped=stats.stopped,
        kl=measured.kl,
        kl_max=measured.kl_max,
        kl_proposed=enforcement.kl_proposed,
        tv=measured.tv,
        max_ratio=measured.max_ratio,
        ratio_quantiles=measured.ratio_quantiles,
        scale=enforcement.scale,
        tries=enforcement.tries,
        limit=enforcement.limit,
        guaranteed=guaranteed(measured, enforcement),
    )
