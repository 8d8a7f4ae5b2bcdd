"""The loss of one micro-batch, and the sums from which its statistics are computed.

The loss of a mini-batch is a mean over its tokens, or over its responses, in all micro-batches and processes. Each micro-batch
adds its sum divided by the mini-batch's count, so that the result does not depend on the split. Statistics are summed
likewise, and divided at the end.

Where responses were sampled from another distribution μ than π_old, the terms that are estimated at sampled tokens are weighted
by `Scored.sampler_weights`, so that they are expectations under π_old: the policy's objective, the shares of its gradient that
were gated, and KL terms with an estimator. Counts, exact KL terms and the value's loss are not weighted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..importance import LARGEST_LOG_RATIO
from ..masking import masked_sum
from ..policy.exact_kl import TokenOutputs
from ..surrogates import ClipRule
from ..types import Batch, EpochStats, MicroBatch
from .response_masks import within

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]
Estimator = Callable[[Tensor, Tensor], Tensor]


class Penalties(NamedTuple):
    """The KL terms of a loss; a coefficient of 0 leaves a term out, an estimator of None means exact.

    anchor_coef: of KL(π‖π_ref), the factor of whitening included. anchor_estimator: (logp, ref_logp) -> [b, t].
    anchor_offpolicy: whether it is weighted by the ratio, without its gradient. trust_coef: of KL(π_old‖π).
    trust_estimator: (old_logp, logp) -> [b, t].
    """

    anchor_coef: float = 0.0
    anchor_estimator: Estimator | None = None
    anchor_offpolicy: bool = False
    trust_coef: float = 0.0
    trust_estimator: Estimator | None = None


class LossSums(NamedTuple):
    """Scalar sums over tokens (`responses` and `masked_responses` over responses, the last three over value positions), added
    over micro-batches and processes."""

    policy_loss: Tensor
    weight: Tensor
    pull: Tensor
    gated: Tensor
    gated_low: Tensor
    gated_high: Tensor
    clipped: Tensor
    squared_log_ratio: Tensor
    ratio: Tensor
    squared_ratio: Tensor
    tokens: Tensor
    terms: Tensor
    masked: Tensor
    masked_responses: Tensor
    responses: Tensor
    value_loss: Tensor
    value_gated: Tensor
    positions: Tensor


class LossScale(NamedTuple):
    """The counts of a mini-batch in all processes by which its sums are divided, at least 1: terms of the policy's loss
    (tokens, or responses; see `token_weights`) and value positions."""

    terms: Tensor | float
    positions: Tensor | float


def token_weights(
    mask: Tensor, aggregation: Aggregation, length: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The weights [b, t] of the tokens in a loss, and the number of terms that the weighted sum is divided by.

    token_mean: the mean over all tokens. sequence_mean: the mean over the tokens of each response, then over the responses
    (GSPO, arXiv 2507.18071; GMPO, arXiv 2507.20673; GRPO, arXiv 2402.03300). sequence_sum: the sum over the tokens of each
    response, divided by the constant `length`, then the mean over the responses (Dr. GRPO, arXiv 2503.20783). A response
    without a token that counts is no term.
    """
    weights = mask.to(dtype)
    if aggregation == "token_mean":
        return weights, mask.sum()
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if aggregation == "sequence_mean" else length
    return weights / lengths, mask.any(1).sum()


def micro_loss(
    out: TokenOutputs,
    micro: MicroBatch,
    batch: Batch,
    scale: LossScale,
    *,
    rule: ClipRule,
    aggregation: Aggregation = "token_mean",
    length: int = 1,
    vf_coef: float,
    value_range: float | None,
    penalties: Penalties,
    mask_kl: float | None = None,
) -> tuple[Tensor, LossSums]:
    """The micro-batch's share of the mini-batch's loss, and its sums. The value is not clipped where `value_range` is None.
    `aggregation` and `length` are those of `token_weights`.

    Responses with a token beyond `mask_kl` are left out, the value's loss included; the number of terms stays as it is, so that
    the others weigh no more than before (Trust Region Masking, arXiv 2512.23075).
    """
    columns = out.logp.shape[1]
    old_logp = batch.scored.logp[micro.rows, :columns]
    advantages = batch.advantages[micro.rows, :columns]
    mask = batch.scored.loss_mask[micro.rows, :columns]
    keep = mask.new_ones((len(mask), 1))
    if mask_kl is not None:
        keep = within(out, micro, batch.scored, mask_kl)
    all_weights, terms = token_weights(mask, aggregation, length, out.logp.dtype)
    importance = None if batch.scored.sampler_weights is None else batch.scored.sampler_weights[micro.rows, :columns]
    all_corrected = all_weights if importance is None else all_weights * importance
    kept, weights, corrected = mask & keep, all_weights * keep, all_corrected * keep
    log_ratio = out.logp - old_logp
    surrogate = rule(log_ratio, advantages, kept, old_logp=old_logp, projection=out.projection)
    policy = -masked_sum(surrogate.objective * corrected, kept)
    if surrogate.penalty is not None:
        policy = policy + masked_sum(surrogate.penalty * weights, kept)
    penalty = kl_terms(out, old_logp, batch.scored.ref_logp[micro.rows, :columns], weights, corrected, penalties)

    value, value_gated, positions = value_terms(out, micro, batch, keep, value_range)
    loss = (policy + penalty) / scale.terms + vf_coef * value / scale.positions
    with torch.no_grad():
        ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
        responses = mask.any(1, keepdim=True)
        sums = LossSums(
            policy_loss=policy.detach(),
            **gated_sums(surrogate.gated, all_corrected * ratio * advantages.abs(), log_ratio, mask, keep),
            # λ·|w − 1| is the penalty's gradient with respect to the log-ratio, where w·A is the surrogate's.
            pull=penalties.trust_coef * masked_sum(corrected * (ratio - 1).abs(), mask),
            squared_log_ratio=masked_sum(log_ratio**2, mask),
            ratio=masked_sum(ratio, mask),
            squared_ratio=masked_sum(ratio**2, mask),
            tokens=mask.sum(),
            terms=terms,
            masked_responses=(responses & ~keep).sum(),
            responses=responses.sum(),
            value_loss=value.detach(),
            value_gated=value_gated,
            positions=positions,
        )
    return loss, sums


def gated_sums(gated: Tensor, weight: Tensor, log_ratio: Tensor, mask: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The sums of a token's weight in the gradient, |w·A| times its weight in the loss, and of what of it was removed."""
    return {
        "weight": masked_sum(weight, mask),
        "gated": masked_sum(gated * weight, mask),
        "gated_low": masked_sum(gated * weight, mask & (log_ratio < 0)),
        "gated_high": masked_sum(gated * weight, mask & (log_ratio > 0)),
        "clipped": masked_sum((gated > 0).float(), mask),
        "masked": masked_sum(weight, mask & ~keep),
    }


def value_terms(
    out: TokenOutputs, micro: MicroBatch, batch: Batch, keep: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Half the sum of the squared errors of the value, over the positions of responses that are kept; how many of these the
    clip gated; and how many there are of all responses."""
    width = min(out.logp.shape[1] + 1, batch.returns.shape[1])
    returns = batch.returns[micro.rows, :width]
    positions = batch.scored.value_mask[micro.rows, :width]
    mask = positions & keep
    squared, clipped = value_loss(out.values[:, :width], batch.scored.values[micro.rows, :width], returns, clip)
    return 0.5 * masked_sum(squared, mask), masked_sum(clipped.float(), mask), positions.sum()


def kl_terms(
    out: TokenOutputs, old_logp: Tensor, ref_logp: Tensor, weights: Tensor, corrected: Tensor, penalties: Penalties
) -> Tensor:
    """The KL terms of the loss, summed over the tokens with a weight above 0.

    weights: those of the tokens in the loss, [b, t], 0 for one that does not count. corrected: the same multiplied by the
    importance weights, for terms that are estimated at the sampled tokens; an exact term has no such factor.
    """
    total = out.logp.new_zeros(())
    if penalties.anchor_coef:
        estimator = penalties.anchor_estimator
        anchor = out.ref_kl if estimator is None else estimator(out.logp, ref_logp)
        assert anchor is not None  # the forward pass computed it
        if penalties.anchor_offpolicy:
            anchor = anchor * (out.logp - old_logp).detach().clamp(max=LARGEST_LOG_RATIO).exp()
        anchor = anchor * (weights if estimator is None else corrected)
        total = total + penalties.anchor_coef * masked_sum(anchor, weights > 0)
    if penalties.trust_coef:
        estimator = penalties.trust_estimator
        trust = out.old_kl if estimator is None else estimator(old_logp, out.logp)
        assert trust is not None  # the forward pass computed it
        trust = trust * (weights if estimator is None else corrected)
        total = total + penalties.trust_coef * masked_sum(trust, weights > 0)
    return total


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Squared errors [b, t], the larger of those of the value and of the value clipped to within `clip` of the old one; and
    where the clipped one is larger, so that the gradient is 0 (Schulman et al., arXiv 1707.06347, as in OpenAI's baselines)."""
    squared = (values - returns) ** 2
    if clip is None:
        return squared, torch.zeros_like(squared, dtype=torch.bool)
    clipped = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    return torch.max(squared, clipped), clipped > squared


def epoch_stats(total: Tensor) -> EpochStats:
    """Means from the gathered sums, a vector in the order of `LossSums`."""
    s: dict[str, float] = dict(zip(LossSums._fields, total.tolist(), strict=True))

    def share(part: float, of: float) -> float:
        return part / of if of else 0.0

    ratio = share(s["ratio"], s["tokens"])
    return EpochStats(
        policy_loss=share(s["policy_loss"], s["terms"]),
        value_loss=share(s["value_loss"], s["positions"]),
        gated=share(s["gated"], s["weight"]),
        gated_low=share(s["gated_low"], s["weight"]),
        gated_high=share(s["gated_high"], s["weight"]),
        clip_fraction=share(s["clipped"], s["tokens"]),
        penalty=share(s["pull"], s["pull"] + s["weight"] - s["masked"]),
        value_gated=share(s["value_gated"], s["positions"]),
        approx_kl=0.5 * share(s["squared_log_ratio"], s["tokens"]),
        ratio=ratio,
        masked=share(s["masked"], s["weight"]),
        masked_responses=share(s["masked_responses"], s["responses"]),
        ratio_var=max(share(s["squared_ratio"], s["tokens"]) - ratio**2, 0.0) if math.isfinite(ratio) else math.nan,
    )
