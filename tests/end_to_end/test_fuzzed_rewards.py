"""Generated rewards: bad ones are rejected with an error of this package, good ones are added up."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.fuzzing import HUGE, INF, NAN, check_rejected, reproducible, text
from trl_trustkl.errors import RewardError
from trl_trustkl.rollout.scorer import Scorer
from trl_trustkl.types import Rollout

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 4


def scores_of(*functions: Any, weights: list[float] | None = None) -> list[float]:
    empty = torch.zeros(COUNT, 1)
    rollout = Rollout(empty.long(), empty.bool(), empty.long(), empty.bool(), None, None)
    weights = weights or [1.0] * len(functions)
    words = [f"w{i}" for i in range(COUNT)]
    scorer = Scorer(functions, weights, batch_size=2)
    scores = scorer(rollout, prompts=words, completions=words, completion_ids=[[3]] * COUNT, state=None)
    return scores.total.tolist()


class Hostile:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("no")

    def __repr__(self) -> str:
        raise self.error("no")


def endless() -> Any:
    yield from itertools.count()


def breaks_off() -> Any:
    yield 1.0
    raise KeyError("half way")


def raising(error: type[Exception]) -> Any:
    def function(prompts, completions, **_):
        raise error("no")

    return function


def hostile(error: type[Exception], place: int) -> Any:
    return lambda prompts, completions, **_: [0.0] * place + [Hostile(error)] + [0.0] * (COUNT - 1 - place)


number = st.floats(-1e6, 1e6, width=32)
bad_reward = st.one_of(
    st.sampled_from(
        [NAN, INF, -INF, 1e39, -1e300, HUGE, -HUGE, "0.5", "good", b"1", [1.0], (1.0,), {}, {"r": 1.0}, 1j, object()]
    ),
    text,
    st.binary(max_size=4),
    st.lists(number, max_size=3),
    st.complex_numbers(),
    st.builds(lambda x: torch.tensor([x]), number),
    st.builds(lambda x: np.array([x]), number),
    st.just(torch.tensor(NAN)),
    st.just(np.float32("inf")),
    st.just(torch.ones(2)),
    st.just(int),
    st.just(Fraction(10**400)),
)
few = st.lists(number, max_size=9).filter(lambda some: len(some) != COUNT)
bad_return = st.one_of(
    few,
    few.map(torch.tensor),
    few.map(np.array),
    few.map(tuple),
    few.map(iter),
    st.none(),
    number,
    text,
    st.binary(),
    st.sets(number),
    st.dictionaries(text, number, max_size=5),
    st.booleans(),
    st.lists(number, min_size=COUNT, max_size=COUNT).map(lambda r: torch.tensor(r).view(2, 2)),
    st.lists(number, min_size=COUNT, max_size=COUNT).map(lambda r: np.array([r])),
    st.tuples(st.integers(0, COUNT - 1), bad_reward).map(lambda p: [0.0] * p[0] + [p[1]] + [0.0] * (COUNT - 1 - p[0])),
    st.sampled_from([torch.tensor(1.0), np.array(1.0), torch.full((COUNT,), NAN), np.full(COUNT, INF), object(), len]),
)
returned = bad_return.map(lambda value: lambda prompts, completions, **_: value)


def eventually(value: Any) -> Any:
    async def function(prompts, completions, **_):
        return value

    return function


ERRORS = st.sampled_from(
    [ValueError, KeyError, RuntimeError, ZeroDivisionError, MemoryError, StopIteration, AssertionError]
)
bad_function = st.one_of(
    st.builds(raising, ERRORS),
    st.builds(hostile, ERRORS, st.integers(0, COUNT - 1)),
    st.sampled_from(
        [
            lambda prompts, completions, **_: endless(),
            lambda prompts, completions, **_: breaks_off(),
            lambda: [0.0] * COUNT,
            lambda text: [0.0] * COUNT,
            len,
            max,
            str,
            lambda **_: (raising(ValueError) for _ in "abcd"),
        ]
    ),
)


def test_invalid_rewards_are_rejected(record_property):
    rejected = len(
        check_rejected(bad_return, lambda v: scores_of(lambda prompts, completions, **_: v), RewardError, 300)
    )
    rejected += len(check_rejected(bad_return, lambda v: scores_of(eventually(v)), RewardError, 30))
    rejected += len(check_rejected(bad_function, scores_of, RewardError, 40))
    too_much = st.floats(1e30, 1e38).map(lambda weight: [weight, weight])
    ones = lambda prompts, completions, **_: [1e30] * COUNT  # noqa: E731
    rejected += len(check_rejected(too_much, lambda weights: scores_of(ones, ones, weights=weights), RewardError, 10))
    record_property("rejected", rejected)


CONTAINERS = [
    list,
    tuple,
    iter,
    lambda r: (x for x in r),
    np.array,
    torch.tensor,
    lambda r: torch.tensor(r).view(-1, 1),
]
CONTAINERS += [
    lambda r: [np.float64(x) for x in r],
    lambda r: [torch.tensor(x) for x in r],
    lambda r: np.array(r)[:, None],
]


@settings(reproducible, max_examples=80)
@given(st.lists(number, min_size=COUNT, max_size=COUNT), st.sampled_from(CONTAINERS), number, st.booleans())
def test_rewards_in_any_container_are_the_numbers_they_are(rewards, container, weight, waits):
    function = eventually(container(rewards)) if waits else lambda prompts, completions, **_: container(rewards)
    assert scores_of(function, weights=[weight]) == pytest.approx([weight * r for r in rewards], rel=1e-6, abs=1e-30)


@settings(reproducible, max_examples=40)
@given(*[st.lists(st.none() | st.booleans() | number, min_size=COUNT, max_size=COUNT)] * 2)
def test_a_row_keeps_the_rewards_it_has(one, other):
    functions = [lambda prompts, completions, r=r, **_: list(r) for r in (one, other)]
    for score, pair in zip(scores_of(*functions), zip(one, other, strict=True), strict=True):
        known = [float(r) for r in pair if r is not None]
        assert score == pytest.approx(sum(known), rel=1e-6) if known else math.isnan(score)
