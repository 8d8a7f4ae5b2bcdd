"""Backtracking: shorten a step until what it measures is within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


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
