"""Importance weights for responses that another distribution than the training pass's has sampled."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .masking import masked_sum

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LARGEST_LOG_RATIO = 40.0
"""Log-ratios are clamped to ± this, or a weight would overflow."""


class ImportanceWeights(NamedTuple):
    """weights: [B, T], 1 outside of the mask. truncated: whether a bound changed the weight of a token, [B, T]."""

    weights: Tensor
    truncated: Tensor


def importance_weights(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    mode: CorrectionMode = "token_truncate",
    *,
    low: float | None = None,
    high: float | None = 3.0,
) -> ImportanceWeights:
    """The weights π_old/μ of sampled tokens, within bounds; [B, T] each.

    old_logp: log π_old of each token in the training pass. sampler_logp: log μ, under the distribution that it was sampled
    from. mask: the tokens that count.

    `token_*`: the ratio of each token. `sequence_*`: the ratio of the response, the product over its tokens, for each of them.
    `*_truncate`: a ratio outside of [low, high] becomes the bound (truncated importance sampling, Ionides, 2008). `*_mask`: it
    becomes 0. A bound of None is none. Without bounds, Σ w·f over tokens sampled from μ has the expectation of f under π_old in
    the same contexts; over responses, with the ratio of the response, of any f of a response.
    """
    log_ratio = torch.where(mask, (old_logp - sampler_logp), 0.0)
    if mode.startswith("sequence"):
        log_ratio = masked_sum(log_ratio, mask, dim=-1).unsqueeze(-1).expand_as(mask)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    outside = torch.zeros_like(mask)
    if low is not None:
        outside = outside | (ratio < low)
    if high is not None:
        outside = outside | (ratio > high)
    bounded = ratio.clamp(low, high) if mode.endswith("truncate") and (low, high) != (None, None) else ratio
    weights = bounded if mode.endswith("truncate") else torch.where(outside, 0.0, ratio)
    return ImportanceWeights(torch.where(mask, weights, 1.0), outside & mask)
