"""Importance weights for responses that were sampled from another distribution than that of the training pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LARGEST_LOG_RATIO = 40.0
"""Log-ratios of weights, and of the loss's statistics, are clamped here before the exponential, which would overflow. The
ratios that are measured after an update are not."""


class ImportanceWeights(NamedTuple):
    """weights: [B, T], 1 outside of the mask. truncated: where a bound changed the weight of a token, [B, T]."""

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
    """The ratio π_old/μ at each sampled token, [B, T], the product of a response's ratios with `sequence_*`, within bounds.

    old_logp: log π_old of the tokens, in the training pass. sampler_logp: log μ, under the distribution that they were sampled
    from. mask: the tokens that count; values outside of it are ignored. low, high: the bounds; None is no bound. A ratio
    outside of them becomes the bound with `*_truncate` (truncated importance sampling, Ionides 2008), and 0 with `*_mask`.

    Without bounds, the mean of weight · f over samples of μ has the expectation of f under π_old: with `sequence_*` for any f
    of a response, with `token_*` for any f of a token in the context in which it was sampled.

    >>> old, sampler = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.1, 0.4]]).log()
    >>> importance_weights(old, sampler, torch.ones(1, 2, dtype=torch.bool))
    ImportanceWeights(weights=tensor([[3.0000, 0.5000]]), truncated=tensor([[ True, False]]))
    """
    log_ratio = torch.where(mask, old_logp - sampler_logp.to(old_logp.dtype), 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(mask)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    truncated = mask & ((ratio < low) | (ratio > high))
    bounded = ratio.clamp(low, high) if mode.endswith("truncate") else torch.where(truncated, 0.0, ratio)
    return ImportanceWeights(torch.where(mask, bounded, 1.0), truncated)
