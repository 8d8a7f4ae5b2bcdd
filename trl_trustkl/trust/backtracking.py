"""Backtracking: shorten a step until its measure is within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

SMALLEST_SCALE, NARROW = 1e-3, 0.25
"""For a measure above 0 at scale 0: the share of a step below which the search ends, and the width, relative to its end, of an
interval that is not searched further."""


class Backtrack(NamedTuple):
    """The scale kept, the measure there, and the number of scales tried."""

    scale: float
    measured: float
    tries: int


def backtrack(
    set_scale: Callable[[float], None],
    measure: Callable[[], float],
    limit: float,
    *,
    proposed: float | None = None,
    start: float = 0.0,
    max_tries: int = 10,
) -> Backtrack:
    """Shorten a step until its measure is within `limit`.

    `set_scale(a)` puts the parameters at θ_old + a(θ − θ_old). `measure()` measures them there; a non-finite value counts as
    above the limit. `proposed` is the measure at scale 1, computed here if it is not given. `start` is the measure at scale 0,
    at most the limit: 0 for a KL to θ_old, but not for one to another policy.

    The KL of a small step grows with its square, hence the first guess a·√(limit/KL), or with a `start`, which is subtracted
    from both, a·√((limit − start)/(KL − start)). Then a secant step in that root is made between the largest scale known to
    be within the limit and the smallest known to be outside, kept away from both. If a step did not halve this interval, the
    next one goes to its middle: secants alone converge slowly where the KL is flat over most of the line. The search ends
    when most of what the limit leaves is used. With a `start` above 0 that may be impossible, as the measure may exceed the
    limit at every scale, or first decrease: the search also ends below `SMALLEST_SCALE`, and when the interval is narrow. The
    result is the largest tried scale with `measured <= limit`; in the worst case it is 0, where θ_old is restored exactly.

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
    inside, inside_value = 0.0, start
    goal, enough = limit - 0.05 * (limit - start), start + 0.8 * (limit - start)
    outside, outside_value = 1.0, proposed
    scale, tries, halved = 1.0, 0, True
    while tries < max_tries:
        if start > 0.0 and (outside <= SMALLEST_SCALE or outside - inside <= NARROW * outside):
            break
        width = outside - inside
        secant = _next_scale(inside, inside_value - start, outside, outside_value - start, goal - start)
        scale = secant if halved else 0.5 * (inside + outside)
        set_scale(scale)
        value = measure()
        tries += 1
        if value <= limit:
            inside, inside_value = scale, value
            if value >= enough:
                break
        else:
            outside, outside_value = scale, value
        halved = outside - inside <= 0.5 * width
    if scale != inside:
        set_scale(inside)
    return Backtrack(inside, inside_value, tries)


def _next_scale(inside: float, inside_value: float, outside: float, outside_value: float, goal: float) -> float:
    """The scale where the root of the value is expected to be √goal; the middle if the outside value is not finite."""
    if not math.isfinite(outside_value):
        return 0.5 * (inside + outside)
    low, high, wanted = math.sqrt(max(inside_value, 0.0)), math.sqrt(outside_value), math.sqrt(goal)
    share = (wanted - low) / (high - low) if high > low else 0.5
    return inside + (outside - inside) * min(max(share, 0.05), 0.95)
