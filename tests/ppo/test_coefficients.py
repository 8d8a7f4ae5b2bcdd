"""The coefficients of a run, against the controllers' rules applied by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from trl_trustkl.ppo.coefficients import Coefficients

EPISODES = 8


def record(anchor: float, trust: float, *, kept: float | None = None, refused: str | None = None) -> Any:
    """The fields of a record that the controllers read, and the KL after enforcement, which they ignore."""
    measured = trust if kept is None else kept
    return SimpleNamespace(
        anchor=SimpleNamespace(kl=-100.0, kl_exact=anchor),
        trust=SimpleNamespace(kl_proposed=trust, kl=measured),
        refused=refused,
    )


def coefficients(tmp_path: Any, **changes: Any) -> Coefficients:
    return Coefficients(tiny.config(tmp_path, **changes))


MOVING = {
    "kl_controller": "adaptive", "kl_coef": 0.1, "kl_target": 2.0, "kl_horizon": 100,
    "trust_controller": "pid", "trust_coef": 0.2, "trust_target": 0.01, "trust_lr_target": 0.02,
}  # fmt: skip
SCHEDULE = {
    "kl_controller": "schedule", "kl_controller_kwargs": {"end_coef": 0.0, "episodes": 32}, "trust_controller": "threshold",
    "trust_coef": 0.2, "trust_target": 0.01,
}  # fmt: skip


def three(of: Coefficients) -> tuple[float, float, float]:
    return of.kl, of.trust, of.lr_factor


def test_controllers_begin_at_the_coefficients_of_the_configuration(tmp_path):
    assert three(coefficients(tmp_path, **MOVING)) == (0.1, 0.2, 1.0)
    assert three(coefficients(tmp_path, kl_coef=0.3)) == (0.3, 0.0, 1.0)


def test_a_fixed_coefficient_follows_the_configuration(tmp_path):
    args = tiny.config(tmp_path, kl_coef=0.3, trust_coef=0.4)
    of = Coefficients(args)
    of.update(record(50.0, 50.0), EPISODES)
    assert three(of) == (0.3, 0.4, 1.0)
    args.kl_coef, args.trust_coef = 0.5, 0.0
    assert three(of) == (0.5, 0.0, 1.0), "a change of the configuration by a callback has no effect"


def test_a_coefficient_that_a_controller_changes_does_not_follow_the_configuration(tmp_path):
    args = tiny.config(tmp_path, **MOVING)
    of = Coefficients(args)
    args.kl_coef, args.trust_coef = 5.0, 6.0
    assert three(of) == (0.1, 0.2, 1.0)


def test_the_anchors_controller_sees_the_exact_kl_of_each_update(tmp_path):
    of, coef = coefficients(tmp_path, **MOVING), 0.1
    for kl in (2.1, 5.0, 0.5, 1.9):
        of.update(record(kl, 0.0), EPISODES)
        coef *= 1 + min(max(kl / 2.0 - 1, -0.2), 0.2) * EPISODES / 100
        assert of.kl == pytest.approx(coef, rel=1e-12)


def test_the_trust_regions_controllers_see_what_was_proposed(tmp_path):
    """Enforcement would hide that the update went too far."""
    one, other = (coefficients(tmp_path, **MOVING) for _ in range(2))
    one.update(record(0.0, 0.5, kept=0.001), EPISODES)
    other.update(record(0.0, 0.5), EPISODES)
    assert three(one) == three(other)
    assert one.trust > 0.2 and one.lr_factor < 1.0
    other.update(record(0.0, 1e-5), EPISODES)
    assert other.trust < one.trust and other.lr_factor > one.lr_factor


@pytest.mark.parametrize(("kl", "factor"), [(0.5, 1 / 1.5), (0.001, 1.0), (0.0, 1.0), (math.nan, 1.0)])
def test_a_rejected_update_changes_the_anchors_coefficient_and_may_lower_the_learning_rate(kl, factor, tmp_path):
    of, apart = (coefficients(tmp_path, **MOVING) for _ in range(2))
    before = of.state_dict()
    of.update(record(5.0, kl, refused="panic_kl"), EPISODES)
    apart.update(record(5.0, math.nan), EPISODES)
    after = of.state_dict()
    assert of.lr_factor == pytest.approx(factor)
    assert after["trust_controller"] == before["trust_controller"]
    assert (
        after["kl_controller"] != before["kl_controller"]
        and after["kl_controller"] == apart.state_dict()["kl_controller"]
    )


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_leaves_the_coefficients_unchanged(kl, tmp_path):
    of = coefficients(tmp_path, **MOVING)
    before = of.state_dict()
    of.update(record(kl, kl), EPISODES)
    assert of.state_dict() == before


def test_a_kl_below_zero_by_rounding_counts_as_zero(tmp_path):
    received: list[tuple[float, int]] = []

    class Receiver:
        def update(self, state: Any, *, kl: float, episodes: int) -> Any:
            received.append((kl, episodes))
            return state

    of = coefficients(tmp_path, **MOVING)
    of.kl_controller = of.trust_controller = of.lr_controller = Receiver()
    of.update(record(-1e-6, -1e-7), EPISODES)
    of.update(record(0.5, 0.25), EPISODES)
    assert received == [(0.0, EPISODES)] * 3 + [(0.5, EPISODES), (0.25, EPISODES), (0.25, EPISODES)]


@pytest.mark.parametrize("changes", [MOVING, SCHEDULE, {}])
def test_the_states_come_back_from_a_file(changes, tmp_path):
    complete, resumed = (coefficients(tmp_path, **changes) for _ in range(2))
    for kl in (5.0, 0.3, 7.0):
        complete.update(record(kl, kl / 100), EPISODES)
    resumed.load_state_dict(json.loads(json.dumps(complete.state_dict())) | {"of another part": 1})
    assert three(resumed) == three(complete) and resumed.state_dict() == complete.state_dict()
    for kl in (1.0, 9.0):
        for each in (complete, resumed):
            each.update(record(kl, kl / 100), EPISODES)
    assert three(resumed) == three(complete) and resumed.state_dict() == complete.state_dict()
    if changes:
        assert three(complete) != three(coefficients(tmp_path, **changes))
