"""What is kept of an update: its record, the metrics that are logged, the completions."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from .. import bounds, records
from ..advantages import explained_variance
from ..certificate import certificate
from ..divergences import k3
from ..masking import masked_mean, masked_sum
from ..records import BoundRecord
from ..rollout.prompts import prompt_texts
from ..rollout.sampling import ended
from ..types import Batch, Enforcement, Measurement, RolloutSummary, UpdateStats
from .config import TrustKLPPOConfig
from .parts import Parts


def summary(batch: Batch, parts: Parts) -> RolloutSummary:
    """Statistics of the rollout over all processes."""
    scored, rollout, gather = batch.scored, batch.scored.rollout, parts.processes.gather
    mask, scores = gather(rollout.response_mask), gather(scored.scores)
    sampler_kl, lowest, highest = None, None, None
    if rollout.sampler_logp is not None:
        sampler_logp, logp = gather(rollout.sampler_logp), gather(scored.logp)
        sampler_kl = float(masked_mean(k3(sampler_logp, logp), mask))
        ratios = (logp - sampler_logp)[mask].double().exp()
        lowest, highest = torch.stack(ratios.aminmax()).tolist() if len(ratios) else (None, None)
    truncated = scored.sampler_truncated
    return RolloutSummary(
        score=_mean(scores),
        length=float(mask.sum(-1).float().mean()),
        eos_rate=float(gather(ended(rollout, parts.models.stop_ids)).float().mean()),
        entropy=float(masked_mean(gather(scored.entropy), mask)),
        sampler_kl=sampler_kl,
        rewards={name: _mean(gather(rewards)) for name, rewards in scored.rewards.items()},
        explained_variance=math.nan
        if batch.groups is not None
        else explained_variance(gather(scored.values), gather(batch.returns), gather(scored.value_mask)),
        groups=batch.groups,
        sampler_ratio_min=lowest,
        sampler_ratio_max=highest,
        sampler_truncated=None if truncated is None else float(masked_mean(gather(truncated).double(), mask)),
        engine=parts.rollouts.name,
    )


def _mean(rewards: torch.Tensor) -> float | None:
    """Of the rewards that are not NaN; None if there are none."""
    known = rewards[~rewards.isnan()]
    return float(known.mean()) if len(known) else None


def record(
    args: TrustKLPPOConfig,
    batch: Batch,
    stats: UpdateStats,
    measured: Measurement,
    parts: Parts,
    episode: int,
    scheduled_lr: float,
) -> BoundRecord:
    """What bounded this update: gated, measured and guaranteed. scheduled_lr: the policy's learning rate by the schedule."""
    context, lr_factor = batch.context, parts.coefficients.lr_factor
    scores = parts.processes.gather(batch.scored.scores)
    certified = certificate(scores, measured, horizon=args.response_length) if context.rejected is None else None
    return bounds.build_record(
        args,
        update=context.update + 1,
        episode=episode,
        lr=scheduled_lr * lr_factor,
        lr_factor=lr_factor,
        trust_coef=batch.trust_coef,
        refused=context.rejected,
        seconds={**context.seconds, "total": time.perf_counter() - context.started},
        rollout=summary(batch, parts),
        anchor=batch.anchor,
        stats=stats,
        measured=measured,
        enforcement=context.enforcement or Enforcement(measured.kl, scale=None, tries=0, limit=None),
        rescaled=parts.optimisation.rescales_gradients,
        counterfactual=context.counterfactual,
        renewed=args.renews_reference(context.update + 1),
        certificate=certified,
    )


def metrics(batch: Batch, stats: UpdateStats, record: BoundRecord, parts: Parts, *, speed: float) -> dict[str, Any]:
    """The record flattened, and the metrics of TRL's PPO trainer by their names. speed: responses per second."""
    scored, gather = batch.scored, parts.processes.gather
    mask = gather(scored.rollout.response_mask)
    ends = torch.tensor(parts.models.stop_ids, device=mask.device, dtype=torch.long)
    penalty = -record.anchor.coef * record.anchor.kl
    has_value = batch.groups is None  # trackers get numbers, so that they get nothing for None
    return {
        **records.flatten(record),
        "eps": speed,
        "objective/kl": record.anchor.kl,
        "objective/entropy": float(masked_sum(-gather(scored.logp), mask, dim=1).mean()),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + (record.score or 0.0),
        "objective/scores": record.score,
        "policy/approxkl_avg": stats.total.approx_kl,
        "policy/clipfrac_avg": stats.total.clip_fraction,
        "policy/entropy_avg": record.entropy,
        "loss/policy_avg": stats.total.policy_loss,
        "loss/value_avg": stats.total.value_loss if has_value else None,
        "val/clipfrac_avg": stats.total.value_gated if has_value else None,
        "val/ratio": stats.total.ratio,
        "val/ratio_var": stats.total.ratio_var,
        "val/num_eos_tokens": int((torch.isin(gather(scored.rollout.response_ids), ends) & mask).sum()),
    }


def completion_rows(batch: Batch, parts: Parts, *, update: int) -> list[dict[str, Any]]:
    """The rows of `completions.jsonl`, with the columns that reward functions logged; `ref_logp` is the reference's
    log-likelihood of the completion, in nats."""
    scored = batch.scored
    columns = {
        "prompt": prompt_texts(scored.rollout, parts.models.tokenizer),
        "completion": scored.completions,
        "score": scored.scores.tolist(),
        "ref_logp": masked_sum(scored.ref_logp, scored.rollout.response_mask, dim=1).tolist(),
        **scored.logged.columns,
        "rewards": records.as_rows(
            {name: each.tolist() for name, each in scored.rewards.items()}, len(scored.completions)
        ),
    }
    rows = [{"update": update, **row} for row in records.as_rows(columns)]
    return [records.as_dict(row) for row in parts.processes.gather_objects(rows)]
