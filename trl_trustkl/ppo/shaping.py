"""From scores and divergences to advantages: the anchor and the score as rewards, and the anchor's share of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..advantages import anchor_part, anchor_rewards, anchor_share, gae, place_scores
from ..masking import weighing_factor, whiten
from ..parallel.processes import Processes
from ..trust.measurement import anchor_measurement
from ..types import Batch, Scored
from .config import TrustKLPPOConfig


def shaped(scored: Scored, args: TrustKLPPOConfig, processes: Processes, *, kl_coef: float, trust_coef: float) -> Batch:
    """The batch for the optimizer. kl_coef, trust_coef: β and λ of this update."""
    mask = scored.loss_mask
    estimator = args.build_kl_estimator()
    divergence = scored.ref_kl if estimator is None else estimator(scored.logp, scored.ref_logp)
    pull = anchor_rewards(divergence, mask, kl_coef if args.anchor_in_reward else 0.0, of_contexts=args.exact_anchor)
    rewards = pull + place_scores(scored.scores, mask, args.score_position)
    scale: Tensor | float = 1.0
    if args.whiten_rewards:
        mean, var = processes.moments(rewards, scored.value_mask)
        rewards = whiten(rewards, scored.value_mask, mean=mean, var=var, shift_mean=False)
        scale = weighing_factor(mean, var)
    advantages = gae(rewards, scored.values, gamma=args.gamma, lam=args.lam)
    returns = advantages + scored.values
    share = _anchor_share(scale * pull, advantages, mask, args, processes) if args.anchor_in_reward else None
    if args.whiten_advantages:
        mean, var = processes.moments(advantages, mask)
        advantages = whiten(advantages, mask, mean=mean, var=var)
        scale *= weighing_factor(mean, var)
    return Batch(
        scored,
        torch.where(mask, advantages, 0.0),
        returns,
        anchor_measurement(
            processes.gather(divergence),
            processes.gather(scored.ref_kl),
            processes.gather(scored.rollout.response_mask),
            coef=kl_coef,
            share=share,
        ),
        advantage_scale=float(scale),
        trust_coef=trust_coef,
        finite=bool(processes.gather(advantages + returns).isfinite().all()),
    )


def _anchor_share(
    rewards: Tensor, advantages: Tensor, mask: Tensor, args: TrustKLPPOConfig, processes: Processes
) -> float:
    mask_of_all = processes.gather(mask)
    part = gae(rewards, gamma=args.gamma, lam=args.lam)
    part = anchor_part(part, mask, processes.gather(part), mask_of_all)
    return anchor_share(processes.gather(part), processes.gather(advantages), mask_of_all)
