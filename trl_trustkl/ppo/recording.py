"""What is kept of an update: the rollout in numbers, the metrics that are logged, the completions."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import bounds, records
from ..advantages import explained_variance
from ..divergences import k3
from ..masking import masked_mean, masked_sum
from ..parallel.processes import Processes
from ..records import BoundRecord
from ..rollout.prompts import prompt_texts
from ..rollout.sampling import ends_with_stop
from ..run.state import OnlineTrainerState
from ..types import Batch, Enforcement, Measurement, RolloutSummary, UpdateStats
from .config import TrustKLPPOConfig
from .parts import Parts


def summary(batch: Batch, stop_ids: list[int], processes: Processes) -> RolloutSummary:
    """The rollout in numbers, over all processes."""
    scored, rollout = batch.scored, batch.scored.rollout
    mask, scores = processes.gather(rollout.response_mask), processes.gather(scored.scores)
    ended = ends_with_stop(rollout.response_ids, rollout.response_mask, stop_ids)
    known = scores[~scores.isnan()]
    sampler_kl = None
    if rollout.sampler_logp is not None:
        sampled = k3(processes.gather(rollout.sampler_logp), processes.gather(scored.logp))
        sampler_kl = float(masked_mean(sampled, mask))
    return RolloutSummary(
        score=float(known.mean()) if len(known) else None,
        length=float(mask.sum(-1).float().mean()),
        eos_rate=float(processes.gather(ended).float().mean()),
        entropy=float(masked_mean(processes.gather(scored.entropy), mask)),
        sampler_kl=sampler_kl,
        explained_variance=explained_variance(
            processes.gather(scored.values), processes.gather(batch.returns), processes.gather(scored.value_mask)
        ),
    )


def record(
    args: TrustKLPPOConfig,
    batch: Batch,
    stats: UpdateStats,
    measured: Measurement,
    parts: Parts,
    state: OnlineTrainerState,
    scheduled_lr: float,
) -> BoundRecord:
    """What bounded this update, in the words gated, measured and guaranteed.

    scheduled_lr: the policy's learning rate by the schedule.
    """
    context, lr_factor = batch.context, parts.coefficients.lr_factor
    enforcement = context.enforcement or Enforcement(measured.kl, scale=None, tries=0, limit=None)
    return bounds.build_record(
        args,
        update=context.update + 1,
        episode=state.episode,
        lr=scheduled_lr * lr_factor,
        lr_factor=lr_factor,
        trust_coef=batch.trust_coef,
        refused=context.rejected,
        seconds={**context.seconds, "total": time.perf_counter() - context.started},
        rollout=summary(batch, parts.stop_ids, parts.processes),
        anchor=batch.anchor,
        stats=stats,
        measured=measured,
        enforcement=enforcement,
    )


def metrics(
    batch: Batch,
    stats: UpdateStats,
    record: BoundRecord,
    *,
    stop_ids: list[int],
    processes: Processes,
    speed: float,
) -> dict[str, Any]:
    """The record flattened, and TRL's own metric names, with the values they should have had. speed: responses a second."""
    scored = batch.scored
    mask = processes.gather(scored.rollout.response_mask)
    ends = torch.tensor(stop_ids, device=mask.device, dtype=torch.long)
    penalty = -record.anchor.coef * record.anchor.kl
    entropy = masked_sum(-processes.gather(scored.logp), mask, dim=1).mean()
    return {
        **records.flatten(record),
        "eps": speed,
        "objective/kl": record.anchor.kl,
        "objective/entropy": float(entropy),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + (record.score or 0.0),
        "objective/scores": record.score,
        "policy/approxkl_avg": stats.total.approx_kl,
        "policy/clipfrac_avg": stats.total.clip_fraction,
        "policy/entropy_avg": record.entropy,
        "loss/policy_avg": stats.total.policy_loss,
        "loss/value_avg": stats.total.value_loss,
        "val/clipfrac_avg": stats.total.value_gated,
        "val/ratio": stats.total.ratio,
        "val/ratio_var": stats.total.ratio_var,
        "val/num_eos_tokens": int((torch.isin(processes.gather(scored.rollout.response_ids), ends) & mask).sum()),
    }


def completion_rows(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, processes: Processes, *, update: int
) -> list[dict[str, Any]]:
    """What goes into `completions.jsonl`: prompt, completion, score and the reference's log-likelihood of it, in nats."""
    scored = batch.scored
    likelihood = masked_sum(scored.ref_logp, scored.rollout.response_mask, dim=1).tolist()
    rows = [
        {"update": update, "prompt": prompt, "completion": text, "score": score, "ref_logp": logp}
        for prompt, text, score, logp in zip(
            prompt_texts(scored.rollout, tokenizer),
            scored.completions,
            scored.scores.tolist(),
            likelihood,
            strict=True,
        )
    ]
    return [records.as_dict(row) for row in processes.gather_objects(rows)]
