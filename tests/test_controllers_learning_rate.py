"""The controller of the learning rate by KL."""

from __future__ import annotations

import math

import pytest

from trl_trustkl.controllers import LearningRateByKL, State
from trl_trustkl.errors import ConfigError, DataError


def test_the_learning_rate_changes_by_a_factor_of_1_5_within_a_32nd_and_32():
    rule = LearningRateByKL(target=0.01)
    assert rule.init() == State(1.0)
    table = [(0.0201, 1 / 1.5), (0.02, 1.0), (0.01, 1.0), (0.005, 1.0), (0.0049, 1.5), (0.0, 1.0), (-1e-9, 1.0)]
    for kl, factor in table:
        assert rule.update(State(1.0), kl=kl, episodes=8).coef == pytest.approx(factor, rel=1e-15), kl
    state = rule.init()
    for i in range(1, 20):
        state = rule.update(state, kl=1.0, episodes=0)
        assert state.coef == pytest.approx(max(1.5**-i, 1 / 32))
    assert state.coef == 1 / 32
    assert rule.update(state, kl=1e-4, episodes=8).coef == pytest.approx(1.5 / 32), (
        "the state wound up beyond the clamp"
    )
    for _ in range(30):
        state = rule.update(state, kl=1e-4, episodes=8)
    assert state.coef == 32.0
    assert rule.update(state, kl=1.0, episodes=8).coef == pytest.approx(32 / 1.5)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_the_learning_rate_by_kl_rejects_an_invalid_kl(kl):
    with pytest.raises(DataError, match="kl"):
        LearningRateByKL(0.01).update(State(1.0), kl=kl, episodes=8)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"target": 0.0}, "target"),
        ({"factor": 1.0}, "factor"),
        ({"min_coef": 0.0}, "min_coef"),
        ({"max_coef": 0.5}, "coef"),
    ],
)
def test_the_learning_rate_by_kl_checks_its_settings(change, field):
    with pytest.raises(ConfigError, match=field):
        LearningRateByKL(**{"target": 0.01} | change)
