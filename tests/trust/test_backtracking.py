"""Backtracking on hand-made curves of KL over the scale of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trustkl.trust.backtracking import Backtrack, backtrack

LIMIT = 0.02


class Curve:
    """KL as a function of the scale, with a log of the scales set and measured."""

    def __init__(self, kl: Callable[[float], float]) -> None:
        self.kl = kl
        self.scale = math.nan
        self.set: list[float] = []
        self.measured: list[tuple[float, float]] = []

    def set_scale(self, scale: float) -> None:
        self.scale = scale
        self.set.append(scale)

    def measure(self) -> float:
        self.measured.append((self.scale, self.kl(self.scale)))
        return self.measured[-1][1]

    def shorten(self, limit: float, **options: Any) -> Backtrack:
        return backtrack(self.set_scale, self.measure, limit, **{"proposed": self.kl(1.0)} | options)


@pytest.mark.parametrize("factor", [1.2, 2.0, 10.0, 100.0, 350.0])
def test_a_quadratic_takes_one_try(factor):
    curve = Curve(lambda a: factor * LIMIT * a * a)
    found = curve.shorten(LIMIT)
    assert found.tries == 1 and len(curve.measured) == 1
    assert found.measured == pytest.approx(0.95 * LIMIT)
    assert found.scale == pytest.approx(math.sqrt(0.95 / factor))
    assert curve.scale == found.scale


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12])
def test_a_quadratic_far_beyond_the_limit_takes_a_few(factor):
    found = Curve(lambda a: factor * LIMIT * a * a).shorten(LIMIT)
    assert found.tries <= 6 and 0.8 * LIMIT <= found.measured <= LIMIT


def test_within_the_limit_nothing_is_touched():
    for proposed in (0.0, 0.5 * LIMIT, LIMIT):
        curve = Curve(lambda a: math.nan)
        assert curve.shorten(LIMIT, proposed=proposed) == Backtrack(1.0, proposed, 0)
        assert curve.set == [] and curve.measured == []


def test_the_proposal_is_measured_at_scale_1_where_it_is_not_given():
    curve = Curve(lambda a: 0.01 * a)
    assert curve.shorten(LIMIT, proposed=None) == Backtrack(1.0, 0.01, 0)
    assert curve.set == [1.0] and len(curve.measured) == 1
    curve = Curve(lambda a: a * a)
    found = curve.shorten(LIMIT, proposed=None)
    assert found.tries == 1 and curve.set[0] == 1.0


@pytest.mark.parametrize("slope", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("start", [0.1, 0.5, 0.9, 0.99])
def test_from_a_start_above_0_most_of_what_the_limit_leaves_is_used(start, slope):
    """A KL to another policy than θ_old: start·LIMIT at scale 0, with a slope there."""
    curve = Curve(lambda a: LIMIT * (start + slope * a + a * a))
    found = curve.shorten(LIMIT, start=start * LIMIT)
    left = (1 - start) * LIMIT
    assert found.measured <= LIMIT and found.measured >= LIMIT - 0.2 * left and found.tries <= 6
    assert curve.scale == found.scale


def test_a_step_that_increases_a_measure_at_its_limit_is_blocked_after_few_tries():
    curve = Curve(lambda a: LIMIT * (1 + a))
    found = curve.shorten(LIMIT, start=LIMIT)
    assert (found.scale, found.measured) == (0.0, LIMIT) and found.tries <= 3 and curve.scale == 0.0


def test_a_step_that_first_decreases_a_measure_at_its_limit_is_kept_in_part():
    curve = Curve(lambda a: LIMIT * (1 - a + 4 * a * a))  # back at the limit at a quarter of the step
    found = curve.shorten(LIMIT, start=LIMIT)
    assert 0.18 < found.scale <= 0.25 and found.measured <= LIMIT and curve.scale == found.scale and found.tries <= 8


SHAPES = {
    "linear": lambda a: a,
    "fourth power": lambda a: a**4,
    "steep start, then flat": lambda a: 0.04 * a / (a + 0.01),
    "flat just above the limit": lambda a: 0.021 * min(1.0, 10 * a),
    "saturating like a softmax": lambda a: 0.3 * math.tanh(30 * a) ** 2,
    "not monotonic": lambda a: a * (1 + 0.9 * math.sin(40 * a)),
    "falling at the end": lambda a: 4 * a * (1.01 - a),
    "jump to far outside": lambda a: 1e-4 * a if a < 0.3 else 5.0,
    "jump just outside": lambda a: 0.001 if 0 < a < 0.7 else 0.03 * (a > 0),
    "infinite beyond a tenth": lambda a: a * a if a < 0.1 else math.inf,
    "NaN beyond a tenth": lambda a: a * a if a < 0.1 else math.nan,
    "a hole with NaN": lambda a: math.nan if 0.05 < a < 0.2 else a,
    "slightly negative by rounding": lambda a: -1e-9 if a < 0.2 else a,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_ends_within_the_limit_and_not_at_0_where_there_is_more(shape):
    curve = Curve(SHAPES[shape])
    found = curve.shorten(LIMIT)
    assert found.measured <= LIMIT
    assert 0 < found.scale < 1, "the entire step was discarded"
    assert found.measured == curve.kl(found.scale) and curve.scale == found.scale
    assert found.tries == len(curve.measured) <= 10


@pytest.mark.parametrize("proposed", [math.nan, math.inf])
def test_a_proposal_that_is_not_finite_counts_as_over_the_limit(proposed):
    curve = Curve(lambda a: proposed if a > 0.4 else a * a)
    found = curve.shorten(LIMIT)
    assert curve.set[0] == 0.5 and 0 < found.scale <= 0.4 and found.measured <= LIMIT


def test_a_tiny_limit_is_met():
    found = Curve(lambda a: 3.0 * a * a).shorten(1e-12)
    assert 0 < found.measured <= 1e-12 and found.scale > 0


@pytest.mark.parametrize("tries", [0, 1, 5, 10])
@pytest.mark.parametrize("kl", [1.0, math.nan, math.inf])
def test_when_no_try_is_within_the_limit_the_start_is_restored(tries, kl):
    curve = Curve(lambda a: kl if a > 0 else 0.0)
    assert curve.shorten(LIMIT, max_tries=tries) == Backtrack(0.0, 0.0, tries)
    assert curve.scale == 0.0 and len(curve.measured) == tries


def test_the_last_scale_tried_is_not_kept_where_it_is_outside():
    curve = Curve(
        lambda a: a * a if a < 0.11 else 1.0
    )  # the first try exceeds the limit, the next is within it, and a later one exceeds it again
    for tries in range(1, 11):
        curve.set.clear()
        found = curve.shorten(LIMIT, max_tries=tries)
        assert curve.set[-1] == found.scale and curve.kl(found.scale) <= LIMIT


values = st.one_of(
    st.floats(min_value=0, max_value=100),
    st.floats(min_value=0, max_value=2 * LIMIT),
    st.sampled_from([math.nan, math.inf, LIMIT, 0.8 * LIMIT, -1e-9]),
)


@settings(deadline=None, max_examples=300)
@given(
    knots=st.lists(st.floats(min_value=0, max_value=1), min_size=0, max_size=12),
    heights=st.lists(values, min_size=13, max_size=13),
    slope=st.floats(min_value=0, max_value=10),
    limit=st.one_of(st.just(LIMIT), st.floats(min_value=1e-9, max_value=1)),
    tries=st.integers(min_value=0, max_value=15),
)
def test_whatever_the_curve_the_limit_holds_at_the_largest_scale_tried_that_has_it(knots, heights, slope, limit, tries):
    steps = sorted(knots)

    def kl(scale: float) -> float:
        return heights[int(np.searchsorted(steps, scale))] + slope * scale**2 if scale > 0 else 0.0

    curve = Curve(kl)
    proposed = kl(1.0)
    found = curve.shorten(limit, max_tries=tries)
    assert found.measured <= limit
    assert 0 <= found.scale <= 1 and found.measured == kl(found.scale)
    if proposed <= limit:
        assert found == Backtrack(1.0, proposed, 0) and not curve.set
        return
    assert curve.set and curve.scale == found.scale < 1
    assert found.tries == len(curve.measured) <= tries
    assert found.scale == max([a for a, value in curve.measured if value <= limit], default=0.0)
