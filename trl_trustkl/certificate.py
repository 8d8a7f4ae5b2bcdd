"""The certificate of an update: whether the surrogate's gain exceeds the bound on its error, as far as its batch shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bounds import ErrorBounds, error_bounds
from .records import CertificateRecord
from .types import Measurement

STANDARD_ERRORS = 2.0
"""By how many of them the gain has to be above the bound: a single ratio of 100 in a batch may make a large gain of chance."""


def is_certified(found: CertificateRecord) -> bool:
    """Whether the gain is above the bound on its error, by `STANDARD_ERRORS`."""
    return found.difference > STANDARD_ERRORS * found.stderr


def certificate(rewards: Tensor | None, measured: Measurement, *, horizon: int) -> CertificateRecord | None:
    """The gain of L(π) = E_μ[R·Σ_t (w_t − 1)] on a batch, less the smallest of `bounds.error_bounds`; None where unknown.

    J(π) ≥ J(μ) + L(π) − bound holds if each number is that of all prompts, contexts and responses. Here the largest KL and
    total variation of the batch, and the range of its rewards, stand for these, and the gain is an estimate from the batch that
    the update was fitted to. So this is a statement about the batch, not a proof.

    Args:
        rewards: of the gathered responses, [B], NaN where there is none; None where their order is not known.
        measured: after the update and its enforcement.
        horizon: the length of the longest response that can be sampled, in tokens.

    None without `measured.responses`, for fewer than two responses with a reward, for one with a reward but no token that
    counts, and where a number is not finite.
    """
    if rewards is None or measured.responses is None:
        return None
    responses = measured.responses
    rewards = rewards.double().cpu()
    known = ~rewards.isnan()
    count = int(known.sum())
    if count < 2 or not (torch.tensor(responses.tokens)[known] > 0).all():
        return None
    rewards, moved = rewards[known], torch.tensor(responses.moved, dtype=torch.float64)[known]
    terms = (rewards - (rewards.sum() - rewards) / (count - 1)) * moved
    gain, stderr = float(terms.mean()), float(terms.std()) / math.sqrt(count)
    width = float(rewards.max() - rewards.min())
    numbers = (gain, stderr, width, measured.kl_max, responses.kl, responses.tv_max, *responses.tv_positions)
    if not all(map(math.isfinite, numbers)):
        return None
    bounds = _bounds(measured, horizon, width)
    smallest = min(reversed(bounds._fields), key=lambda name: getattr(bounds, name))
    least = gain - STANDARD_ERRORS * stderr
    needed = None if least <= 0 else _scale(measured, horizon, width, least) ** 2 * measured.kl_max
    return CertificateRecord(gain, stderr, min(bounds), gain - min(bounds), smallest, needed)


def _bounds(measured: Measurement, horizon: int, width: float, scale: float = 1.0) -> ErrorBounds:
    """The bounds on the batch, for `scale` of the step: a factor of total variation and, squared, of KL, to leading order."""
    assert measured.responses is not None
    responses = measured.responses
    kl = scale**2 * max(0.0, responses.kl)
    positions = [scale * tv for tv in responses.tv_positions]
    return error_bounds(
        max(horizon, len(positions)),
        kl_max=scale**2 * max(0.0, measured.kl_max),
        kl_sequence=kl,
        tv_max=scale * min(1.0, responses.tv_max),
        tv_sequence=min(1.0, sum(positions), math.sqrt(kl / 2)),
        tv_positions=positions,
        width=width,
    )


def _scale(measured: Measurement, horizon: int, width: float, gain: float) -> float:
    """The largest scale in [0, 1] at which the bound is at most the gain, which has the scale as a factor."""
    low, high = 0.0, 1.0
    if min(_bounds(measured, horizon, width)) < gain:
        return high
    for _ in range(40):  # the bound over the scale grows with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if min(_bounds(measured, horizon, width, middle)) < gain * middle else (low, middle)
    return low
