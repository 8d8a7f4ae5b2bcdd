"""The trust region KL(π_old‖π): what it measured after an update, and the line back to where the update began."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masking import masked_mean
from .types import Measurement

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def measurement(kl: Tensor, tv: Tensor, log_ratio: Tensor, mask: Tensor, *, complete: bool) -> Measurement:
    """Summary of an update from per-token exact KL(π_old‖π), total variation and log π/π_old, [B, T] each.

    The arguments are pooled over all processes, so that every process gets the same numbers. `complete` says whether the
    mask holds every response token of the batch.
    """
    count = int(mask.sum())
    if count == 0:
        return Measurement(0.0, 0.0, 0.0, 1.0, {str(q): 1.0 for q in QUANTILES}, 0, complete)
    kls, ratios = kl[mask].double(), log_ratio[mask].double()
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device=ratios.device)
    # The exponential is monotonic, so quantiles are taken in log space and only then exponentiated.
    quantiles = _exp(torch.quantile(ratios, levels))
    return Measurement(
        kl=float(kls.mean()),
        kl_max=float(kls.max()),
        tv=float(masked_mean(tv.double(), mask)),
        max_ratio=_exp(ratios.max().unsqueeze(0))[0],
        ratio_quantiles=dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        tokens=count,
        complete=complete,
    )


def _exp(log_ratio: Tensor) -> list[float]:
    return [math.exp(min(x, 700.0)) if math.isfinite(x) else math.nan for x in log_ratio.tolist()]


class Line:
    """The segment from θ_old to θ of some parameters, in their own precision: `set_scale(a)` moves them along it.

    Scale 0 restores θ_old bit for bit, scale 1 the θ at which the line was drawn.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.start = [p.detach().clone() for p in self.parameters]
        self.end: list[Tensor] | None = None

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Put the parameters at θ_old + scale·(θ − θ_old)."""
        if self.end is None:
            self.end = [p.detach().clone() for p in self.parameters]
        for parameter, start, end in zip(self.parameters, self.start, self.end, strict=True):
            if scale == 0.0:
                parameter.copy_(start)
            elif scale == 1.0:
                parameter.copy_(end)
            else:
                parameter.copy_(torch.lerp(start, end, scale))

    def restore(self) -> None:
        """Put the parameters back at θ_old, whatever they are now."""
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.copy_(start)


class Backtrack(NamedTuple):
    """The scale kept, what was measured there, and how many scales were tried."""

    scale: float
    measured: float
    tries: int


def backtrack(
    set_scale: Callable[[float], None],
    measure: Callable[[], float],
    limit: float,
    *,
    proposed: float | None = None,
    max_tries: int = 10,
) -> Backtrack:
    """Shorten a step until what it measures is within `limit`.

    `set_scale(a)` puts the parameters at θ_old + a(θ − θ_old); `measure()` measures there, 0 at scale 0 and non-finite
    counting as too much; `proposed` is the measure at scale 1, measured here when it is not given. KL grows with the
    square of a small step, hence the first guess a·√(limit/KL); then a secant step in √KL between the largest scale known
    to be within the limit and the smallest known to be outside, kept off both ends. A step that did not halve what lies
    between them is followed by one to the middle: where KL is flat over most of the line, secants alone would crawl. Ends
    with `measured <= limit`, at the largest scale tried that has it, in the worst case at scale 0, where θ_old is restored
    exactly.

    >>> at = {}
    >>> kept = backtrack(lambda scale: at.update(scale=scale), lambda: 0.08 * at["scale"] ** 2, limit=0.02)
    >>> round(kept.scale, 3), round(kept.measured, 3), kept.tries
    (0.487, 0.019, 1)
    """
    if proposed is None:
        set_scale(1.0)
        proposed = measure()
    if proposed <= limit:
        return Backtrack(1.0, proposed, 0)
    inside, inside_value = 0.0, 0.0
    outside, outside_value = 1.0, proposed
    scale = math.nan
    tries = 0
    halved = True
    while tries < max_tries:
        width = outside - inside
        secant = _next_scale(inside, inside_value, outside, outside_value, limit)
        guess = secant if halved else 0.5 * (inside + outside)
        set_scale(guess)
        value = measure()
        scale, tries = guess, tries + 1
        if value <= limit:
            inside, inside_value = guess, value
            if value >= 0.8 * limit:
                break
        else:
            outside, outside_value = guess, value
        halved = outside - inside <= 0.5 * width
    if scale != inside:
        set_scale(inside)
    return Backtrack(inside, inside_value, tries)


def _next_scale(inside: float, inside_value: float, outside: float, outside_value: float, limit: float) -> float:
    """Where √KL is expected to be √limit, aiming a little low; the middle where the outside value is no number."""
    if not math.isfinite(outside_value):
        return 0.5 * (inside + outside)
    low, high, goal = math.sqrt(max(inside_value, 0.0)), math.sqrt(outside_value), math.sqrt(0.95 * limit)
    share = (goal - low) / (high - low) if high > low else 0.5
    return inside + (outside - inside) * min(max(share, 0.05), 0.95)
