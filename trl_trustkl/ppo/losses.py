"""The loss of one micro-batch, and the sums its statistics are made of.

A mini-batch's loss is a mean over its tokens, over all micro-batches and processes: each micro-batch adds its sum divided
by the mini-batch's count, so that the split changes nothing. Statistics are sums too, pooled by token at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..masking import masked_sum
from ..surrogates import Surrogate
from ..types import Batch, EpochStats, MicroBatch, TokenOutputs

Rule = Callable[..., Surrogate]


class LossSums(NamedTuple):
    """Sums over tokens (the last three over value positions), scalars each; added over micro-batches and processes."""

    policy_loss: Tensor
    weight: Tensor
    gated: Tensor
    gated_low: Tensor
    gated_high: Tensor
    clipped: Tensor
    squared_log_ratio: Tensor
    ratio: Tensor
    squared_ratio: Tensor
    tokens: Tensor
    value_loss: Tensor
    value_gated: Tensor
    positions: Tensor


class LossScale(NamedTuple):
    """What the sums of a mini-batch are divided by: its tokens and value positions, over all processes."""

    tokens: float
    positions: float


def micro_loss(
    out: TokenOutputs,
    micro: MicroBatch,
    batch: Batch,
    scale: LossScale,
    *,
    rule: Rule,
    vf_coef: float,
    value_range: float | None,
) -> tuple[Tensor, LossSums]:
    """This micro-batch's share of the mini-batch's loss, and its sums. `value_range` None leaves the value unclipped."""
    length = out.logp.shape[1]
    old_logp = batch.scored.logp[micro.rows, :length]
    advantages = batch.advantages[micro.rows, :length]
    mask = batch.scored.loss_mask[micro.rows, :length]
    log_ratio = out.logp - old_logp
    surrogate = rule(log_ratio, advantages, mask, old_logp=old_logp)
    policy = -masked_sum(surrogate.objective, mask)

    width = min(length + 1, batch.returns.shape[1])
    returns = batch.returns[micro.rows, :width]
    old_values = batch.scored.values[micro.rows, :width]
    value_mask = batch.scored.value_mask[micro.rows, :width]
    squared, clipped = value_loss(out.values[:, :width], old_values, returns, value_range)
    value = 0.5 * masked_sum(squared, value_mask)

    loss = policy / max(scale.tokens, 1.0) + vf_coef * value / max(scale.positions, 1.0)
    with torch.no_grad():
        sums = _sums(policy, surrogate.gated, log_ratio, advantages, mask, value, clipped, value_mask)
    return loss, sums


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Squared errors [b, t], at worst of the value and of the value clipped to within `clip` of the old one; and where
    the clipped one was worse, so that the gradient is 0 (Schulman et al., arXiv 1707.06347, as in OpenAI's baselines)."""
    squared = (values - returns) ** 2
    if clip is None:
        return squared, torch.zeros_like(squared, dtype=torch.bool)
    clipped = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    return torch.max(squared, clipped), clipped > squared


def _sums(
    policy: Tensor,
    gated: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    value: Tensor,
    value_clipped: Tensor,
    value_mask: Tensor,
) -> LossSums:
    # A ratio beyond e^40 would only turn the sums into inf; the largest ratio is measured after the update, unclamped.
    ratio = log_ratio.clamp(max=40.0).exp()
    weight = ratio * advantages.abs()
    return LossSums(
        policy_loss=policy.detach(),
        weight=masked_sum(weight, mask),
        gated=masked_sum(gated * weight, mask),
        gated_low=masked_sum(gated * weight, mask & (log_ratio < 0)),
        gated_high=masked_sum(gated * weight, mask & (log_ratio > 0)),
        clipped=masked_sum((gated > 0).float(), mask),
        squared_log_ratio=masked_sum(log_ratio**2, mask),
        ratio=masked_sum(ratio, mask),
        squared_ratio=masked_sum(ratio**2, mask),
        tokens=mask.sum(),
        value_loss=value.detach(),
        value_gated=masked_sum(value_clipped.float(), value_mask),
        positions=value_mask.sum(),
    )


def stacked(sums: LossSums) -> Tensor:
    return torch.stack([s.detach().double() for s in sums])


def epoch_stats(total: Tensor) -> EpochStats:
    """Means from the pooled sums (a vector in the order of `LossSums`)."""
    s = LossSums(*total.tolist())  # type: ignore[arg-type]

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    ratio = share(s.ratio, s.tokens)
    return EpochStats(
        policy_loss=share(s.policy_loss, s.tokens),
        value_loss=share(s.value_loss, s.positions),
        gated=share(s.gated, s.weight),
        gated_low=share(s.gated_low, s.weight),
        gated_high=share(s.gated_high, s.weight),
        clip_fraction=share(s.clipped, s.tokens),
        value_gated=share(s.value_gated, s.positions),
        approx_kl=0.5 * share(s.squared_log_ratio, s.tokens),
        ratio=ratio,
        ratio_var=max(share(s.squared_ratio, s.tokens) - ratio**2, 0.0) if math.isfinite(ratio) else math.nan,
    )
