"""What the fuzzing tests share: ranges of numbers, text, and the check that every generated bad input is rejected."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAN, INF, HUGE = math.nan, math.inf, 10**400

reproducible = settings(
    derandomize=True,
    database=None,
    deadline=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check_rejected(
    bad: st.SearchStrategy[Any], attempt: Callable[[Any], Any], error: type[Exception], examples: int
) -> set[str]:
    """Check that every example raises `error`; returns the examples as text."""
    seen: set[str] = set()

    @settings(reproducible, max_examples=examples)
    @given(bad)
    def check(example: Any) -> None:
        seen.add(
            repr(type(example))
            + (str(len(seen)) if isinstance(example, int) and abs(example) > 1e300 else repr(example))
        )
        with pytest.raises(error) as caught:
            attempt(copy.copy(example))
        assert len(str(caught.value)) > 20, "the message of the error is too short"

    check()
    return seen


text = st.text(max_size=20)


def above(limit: float) -> st.SearchStrategy[Any]:
    return st.floats(limit, exclude_min=True, allow_infinity=False) | st.integers(int(limit) + 1, 10**300)


def below(limit: float) -> st.SearchStrategy[Any]:
    return st.floats(max_value=limit, exclude_max=True, allow_infinity=False) | st.integers(
        -(10**300), math.ceil(limit) - 1
    )


def is_json(given: str) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(given)
        return True
    return False
