"""From scores and divergences to advantages: the anchor and the score as rewards, and the anchor's share of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..advantages import (
    STD_OFFSET,
    anchor_part,
    anchor_rewards,
    anchor_share,
    gae,
    group_advantages,
    group_part,
    place_scores,
)
from ..masking import masked_moments, weighing_factor, whiten
from ..parallel.processes import Processes
from ..trust.measurement import anchor_measurement
from ..types import Batch, Groups, Scored
from .config import TrustKLPPOConfig


class _Shaped(NamedTuple):
    """advantages, returns: [B, T]. scale: the factor of whitening. share: the anchor's."""

    advantages: Tensor
    returns: Tensor
    scale: float
    share: float | None
    groups: Groups | None = None


def shaped(scored: Scored, args: TrustKLPPOConfig, processes: Processes, *, kl_coef: float, trust_coef: float) -> Batch:
    """The batch for the optimizer. kl_coef, trust_coef: β and λ of this update."""
    estimator = args.build_kl_estimator()
    divergence = scored.ref_kl if estimator is None else estimator(scored.logp, scored.ref_logp)
    coef = kl_coef if args.anchor_in_reward else 0.0
    pull = anchor_rewards(divergence, scored.loss_mask, coef, of_contexts=args.exact_anchor)
    found = (_by_value if args.has_value else _by_group)(scored, pull, args, processes)
    return Batch(
        scored,
        torch.where(scored.loss_mask, found.advantages, 0.0),
        found.returns,
        anchor_measurement(
            processes.gather(divergence),
            processes.gather(scored.ref_kl),
            processes.gather(scored.rollout.response_mask),
            coef=kl_coef,
            share=found.share,
        ),
        advantage_scale=found.scale,
        trust_coef=trust_coef,
        finite=bool(processes.gather(found.advantages + found.returns).isfinite().all()),
        groups=found.groups,
    )


def _by_value(scored: Scored, pull: Tensor, args: TrustKLPPOConfig, processes: Processes) -> _Shaped:
    """Generalised advantage estimation. pull: the anchor's rewards, [B, T]."""
    mask = scored.loss_mask
    rewards = pull + place_scores(scored.scores, mask, args.score_position)
    scale: Tensor | float = 1.0
    if args.whiten_rewards:
        mean, var = processes.moments(rewards, scored.value_mask)
        rewards = whiten(rewards, scored.value_mask, mean=mean, var=var, shift_mean=False)
        scale = weighing_factor(mean, var)
    advantages = gae(rewards, scored.values, gamma=args.gamma, lam=args.lam)
    returns = advantages + scored.values
    share = _anchor_share(scale * pull, advantages, mask, args, processes) if args.anchor_in_reward else None
    if args.whitens_advantages:
        mean, var = processes.moments(advantages, mask)
        advantages = whiten(advantages, mask, mean=mean, var=var)
        scale *= weighing_factor(mean, var)
    return _Shaped(advantages, returns, float(scale), share)


def _anchor_share(
    rewards: Tensor, advantages: Tensor, mask: Tensor, args: TrustKLPPOConfig, processes: Processes
) -> float:
    mask_of_all = processes.gather(mask)
    part = gae(rewards, gamma=args.gamma, lam=args.lam)
    part = anchor_part(part, mask, processes.gather(part), mask_of_all)
    return anchor_share(processes.gather(part), processes.gather(advantages), mask_of_all)


def _by_group(scored: Scored, pull: Tensor, args: TrustKLPPOConfig, processes: Processes) -> _Shaped:
    """Every token of a response has the response's advantage: its score and the anchor's rewards, compared with those of the
    other responses to its prompt, which may be on other processes."""
    pulls, scores = processes.gather(pull.sum(1)), processes.gather(scored.scores)
    known, mask = ~scores.isnan(), processes.gather(scored.loss_mask)
    size, estimator = args.num_generations, args.advantage_estimator
    found = group_advantages(
        torch.where(known, scores, 0.0) + pulls, known, size=size, estimator=estimator, scale=args.reward_scale
    )
    share = None
    if args.anchor_in_reward:
        part = group_part(pulls, known, found, size=size, estimator=estimator)
        share = anchor_share(part.unsqueeze(1).expand_as(mask), found.advantages.unsqueeze(1).expand_as(mask), mask)
    advantages, scale = found.advantages, 1.0
    if args.whitens_advantages:  # over responses, as RLOO's `normalize_advantages` of TRL
        mean, var = masked_moments(advantages, found.compared)
        advantages = torch.where(found.signal, (advantages - mean) / (var.sqrt() + STD_OFFSET), 0.0)
        scale = 1.0 / float(var.sqrt() + STD_OFFSET) if var > 0 else 1.0
    mine = advantages[processes.index * len(pull) :][: len(pull)].unsqueeze(1)
    signal = found.signal.view(-1, size).any(1)
    groups = Groups(len(signal), int((~signal).sum()))
    return _Shaped(mine.expand_as(pull), torch.zeros_like(pull), scale, share, groups)
