"""Controllers in closed loop, where the KL is a known function of the coefficient, and step by step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from scipy.optimize import brentq

from trl_trustkl.controllers import (
    CONTROLLERS,
    MAX_COEF,
    MIN_COEF,
    PIDKL,
    AdaptiveKL,
    ControllerName,
    DualKL,
    FixedKL,
    ScheduledKL,
    ThresholdKL,
    build_controller,
)
from trl_trustkl.errors import ConfigError, DataError

COEF, TARGET = 0.1, 6.0
BUILT = {name: build_controller(name, coef=COEF, target=TARGET) for name in CONTROLLERS if name != "schedule"}
BUILT["schedule"] = build_controller("schedule", coef=COEF, target=TARGET, end_coef=0.01, episodes=1000)
FOLLOWING = ("adaptive", "threshold", "pid", "dual")  # those that follow a target


class TiltedFamily:
    """p_β ∝ q·exp(r/β) maximises E_p[r] − β·KL(p‖q); KL(p_β‖q) falls as β grows."""

    def __init__(self, seed: int, size: int = 2000, scale: float = 1.0):
        rng = np.random.default_rng(seed)
        self.log_q = np.log(rng.dirichlet(np.ones(size)))
        self.reward = scale * rng.normal(size=size)

    def kl(self, beta: float) -> float:
        tilted = self.log_q + self.reward / beta
        log_p = tilted - np.logaddexp.reduce(tilted)
        return float(np.sum(np.exp(log_p) * (log_p - self.log_q)))

    def beta(self, kl: float) -> float:
        return brentq(lambda beta: self.kl(beta) - kl, 1e-4, 1e4, xtol=1e-14)


class GaussianFamily:
    """The same with a reward that is Gaussian under q: KL = σ²/(2β²), which is unbounded."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def kl(self, beta: float) -> float:
        return (self.scale / beta) ** 2 / 2

    def beta(self, kl: float) -> float:
        return self.scale / math.sqrt(2 * kl)


def closed_loop(controller, family, updates: int, episodes: int) -> tuple[list[float], list[float]]:
    """The coefficient and the measured KL of each update."""
    state, coefs, kls = controller.init(), [], []
    for _ in range(updates):
        coefs.append(state.coef)
        kls.append(family.kl(state.coef))
        state = controller.update(state, kl=kls[-1], episodes=episodes)
    return coefs, kls


# -- Closed loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("name", ["adaptive", "pid", "dual"])
@pytest.mark.parametrize(
    ("family", "target"),
    [
        (TiltedFamily(0), 1.0),
        (TiltedFamily(1), 0.1),
        (TiltedFamily(2, scale=0.05), 1.0),
        (TiltedFamily(3, scale=30.0), 2.0),
        (GaussianFamily(), 6.0),
        (GaussianFamily(0.01), 6.0),
        (GaussianFamily(20.0), 0.02),
    ],
)
def test_settles_from_ten_times_too_small_and_too_large(family, target, name, start):
    wanted = family.beta(target)
    arguments = {"horizon": 1000} if name == "adaptive" else {}
    controller = CONTROLLERS[name](coef=start * wanted, target=target, **arguments)
    coefs, kls = closed_loop(controller, family, updates=400, episodes=512)
    assert coefs[0] == start * wanted
    np.testing.assert_allclose(kls[-100:], target, rtol=0.1)
    np.testing.assert_allclose(coefs[-100:], wanted, rtol=0.1)
    assert max(coefs) <= 1.5 * max(wanted, coefs[0])  # no overshoot
    assert min(coefs) >= min(wanted, coefs[0]) / 1.5


def test_ziegler_settles_with_its_published_constants():
    """K* = 6 nats, horizon 10,000, 512 episodes: at most 1.02 % per update, so that a factor of ten takes 230 updates."""
    family = GaussianFamily()
    for start in (0.1, 10.0):
        _, kls = closed_loop(AdaptiveKL(start * family.beta(6.0), 6.0), family, updates=1000, episodes=512)
        assert kls[-1] == pytest.approx(6.0, rel=0.1)
        assert kls[150] != pytest.approx(6.0, rel=0.5)


@pytest.mark.parametrize("start", [0.1, 1 / 3, 0.9, 1.7, 10.0])
@pytest.mark.parametrize("family", [TiltedFamily(0), GaussianFamily()])
def test_threshold_ends_in_its_band_or_alternates_across_it(family, start):
    target, band = 1.0, 1.5
    controller = ThresholdKL(start * family.beta(target), target, band=band)
    coefs, kls = closed_loop(controller, family, updates=60, episodes=512)
    tail, coef_tail = kls[-10:], coefs[-10:]
    settled = all(target / band <= kl <= target * band for kl in tail) and len(set(coef_tail)) == 1
    alternates = all((a > target * band and b < target / band) or (b > target * band and a < target / band)
                     for a, b in pairwise(tail))  # fmt: skip
    assert settled or alternates
    assert 0.2 < np.mean(coef_tail) / family.beta(target) < 5


def test_threshold_does_alternate_where_the_band_is_narrower_than_the_step():
    """KL ∝ 1/β²: from 0.37 of the target, halving β leads to 1.48 and doubling it back, indefinitely."""
    family = GaussianFamily()
    _, kls = closed_loop(ThresholdKL(family.beta(0.37), 1.0, band=1.4), family, updates=40, episodes=512)
    np.testing.assert_allclose(kls[-4:], [0.37, 1.48, 0.37, 1.48], rtol=1e-9)


# -- The published arithmetic, step by step ----------------------------------------------------------------------------


def test_ziegler_arithmetic_step_by_step():
    """Hand-computed: β0 = 0.15, K* = 6, 512 episodes, horizon 10,000."""
    state = AdaptiveKL(0.15, 6.0).init()
    steps = [
        (6.0, 0.15),  # on target: no change
        (100.0, 0.15 * 1.01024),  # +0.2 · 0.0512
        (6.6, 0.15 * 1.01024 * 1.00512),  # +0.1 · 0.0512
        (0.0, 0.15 * 1.01024 * 1.00512 * 0.98976),  # −0.2 · 0.0512
        (5.7, 0.15 * 1.01024 * 1.00512 * 0.98976 * 0.99744),  # −0.05 · 0.0512
        (-3.0, 0.15 * 1.01024 * 1.00512 * 0.98976 * 0.99744 * 0.98976),  # a negative KL counts as far below the target
    ]
    for kl, expected in steps:
        state = AdaptiveKL(0.15, 6.0).update(state, kl=kl, episodes=512)
        assert state.coef == pytest.approx(expected, rel=1e-14)


def test_threshold_arithmetic():
    controller = ThresholdKL(1.0, 0.01)
    for kl, expected in [(0.0151, 2.0), (0.0149, 1.0), (0.0067, 1.0), (0.0066, 0.5), (-1.0, 0.5)]:
        assert controller.update(controller.init(), kl=kl, episodes=1).coef == expected


def test_dual_arithmetic():
    controller = DualKL(1.0, 2.0, lr=0.05)
    for kl, expected in [
        (2.0, 1.0),
        (3.0, math.exp(0.025)),
        (99.0, math.exp(0.05)),
        (0.0, math.exp(-0.05)),
        (-9.0, math.exp(-0.05)),
    ]:
        assert controller.update(controller.init(), kl=kl, episodes=1).coef == pytest.approx(expected, rel=1e-14)


def test_pid_arithmetic():
    controller = PIDKL(0.5, 2.0, kp=0.1, ki=0.2, kd=0.4)
    state = controller.init()
    assert state.coef == 0.5
    integral, previous = math.log(0.5), 0.0
    for kl, error in [(3.0, 0.5), (3.5, 0.75), (2.0, 0.0), (50.0, 1.0), (-4.0, -1.0)]:
        state = controller.update(state, kl=kl, episodes=1)
        integral += 0.2 * error
        rise, previous = max(error - previous, 0.0), error
        assert state.coef == pytest.approx(math.exp(integral + 0.1 * error + 0.4 * rise), rel=1e-13)
    on_target = PIDKL(0.5, 2.0)
    assert on_target.update(on_target.init(), kl=2.0, episodes=1).coef == pytest.approx(0.5, rel=1e-15)


def test_schedule_is_a_line_over_episodes():
    controller = ScheduledKL(0.2, 0.05, episodes=1000)
    state, coefs = controller.init(), []
    for _ in range(6):
        coefs.append(state.coef)
        state = controller.update(state, kl=99.0, episodes=250)
    np.testing.assert_allclose(coefs, [0.2, 0.1625, 0.125, 0.0875, 0.05, 0.05], rtol=1e-14)
    off = ScheduledKL(0.1, 0.0, episodes=10)
    assert off.update(off.init(), kl=1.0, episodes=10).coef == 0.0


def test_fixed_never_moves_and_may_be_zero():
    for coef in (0.0, 0.05, 1e9):
        controller = FixedKL(coef)
        state = controller.init()
        for kl in (0.0, 1e9, -5.0):
            state = controller.update(state, kl=kl, episodes=512)
        assert state.coef == coef


# -- Contracts ---------------------------------------------------------------------------------------------------------


def test_dict_and_literal_agree():
    assert (
        get_args(ControllerName) == tuple(CONTROLLERS) == ("fixed", "adaptive", "threshold", "pid", "dual", "schedule")
    )


@pytest.mark.parametrize("name", CONTROLLERS)
def test_update_returns_a_new_state_and_changes_nothing_else(name):
    controller = BUILT[name]
    first = controller.init()
    assert first.coef == COEF
    before = tuple(first)
    second = controller.update(first, kl=9.0, episodes=512)
    assert tuple(first) == before  # the given state is unchanged
    assert type(second) is type(first)
    assert all(isinstance(number, (int, float)) for number in second)
    assert controller.update(first, kl=9.0, episodes=512) == second  # the controller keeps no state
    assert type(first)(*second) == second  # a checkpoint can hold it as a list
    with pytest.raises(AttributeError):
        controller.coef = 1.0


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_an_error(name, kl):
    with pytest.raises(DataError, match="`kl` got"):
        BUILT[name].update(BUILT[name].init(), kl=kl, episodes=512)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("episodes", [-1, math.nan, math.inf])
def test_episodes_must_be_a_count(name, episodes):
    with pytest.raises(DataError, match="`episodes` got"):
        BUILT[name].update(BUILT[name].init(), kl=1.0, episodes=episodes)


@pytest.mark.parametrize("name", FOLLOWING)
def test_the_coefficient_moves_towards_the_target(name):
    controller = BUILT[name]
    for kl, sign in [(3 * TARGET, 1), (TARGET, 0), (TARGET / 3, -1), (0.0, -1), (-TARGET, -1)]:
        moved = controller.update(controller.init(), kl=kl, episodes=512).coef / COEF - 1
        assert np.sign(round(moved, 14)) == sign, kl


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize(("pushing", "relieving"), [(1e6, 0.0), (0.0, 1e6), (-50.0, 1e6)])
def test_leaves_saturation_on_the_first_update_that_requires_it(name, pushing, relieving):
    extra = {"horizon": 1000} if name == "adaptive" else {}
    controller = CONTROLLERS[name](COEF, TARGET, min_coef=0.01, max_coef=2.0, **extra)
    state, bound = controller.init(), 2.0 if pushing > 0 else 0.01
    for _ in range(1000):
        state = controller.update(state, kl=pushing, episodes=512)
        assert 0.01 <= state.coef <= 2.0
    assert state.coef == pytest.approx(bound, rel=1e-12)
    released = controller.update(state, kl=relieving, episodes=512).coef
    assert (released < 0.99 * bound) if pushing > 0 else (released > 1.01 * bound)


@pytest.mark.parametrize("name", FOLLOWING)
def test_recovers_after_long_saturation(name):
    """After 1,000 updates at either limit of the coefficient, the closed loop settles as from a fresh start there."""
    family, target = GaussianFamily(), 1.0
    extra = {"horizon": 1000} if name == "adaptive" else {}
    wanted = family.beta(target)
    controller = CONTROLLERS[name](wanted, target, min_coef=wanted / 20, max_coef=wanted * 20, **extra)
    for stuck in (1e6, 0.0):
        state = controller.init()
        for _ in range(1000):
            state = controller.update(state, kl=stuck, episodes=512)
        for _ in range(300):
            state = controller.update(state, kl=family.kl(state.coef), episodes=512)
        # the threshold rule ends in its band or one step from it
        assert state.coef == pytest.approx(wanted, rel=1.0 if name == "threshold" else 0.05)


# -- Errors ------------------------------------------------------------------------------------------------------------

GOOD = {"coef": 0.1, "target": 6.0}
BAD = [
    *[(cls, {"coef": value}, "coef") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)
      for value in (0, -1.0, math.nan, math.inf, "0.1", None, True)],
    *[(cls, {"target": value}, "target") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)
      for value in (0, -6.0, math.nan, math.inf)],
    *[(cls, {"min_coef": 1.0, "max_coef": 0.5}, "max_coef") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)],
    *[(cls, {"min_coef": 0.0}, "min_coef") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)],
    *[(cls, {"min_coef": 0.2}, "coef") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)],
    *[(cls, {"max_coef": 0.05}, "coef") for cls in (AdaptiveKL, ThresholdKL, PIDKL, DualKL)],
    *[(AdaptiveKL, {"horizon": value}, "horizon") for value in (0, -1, math.nan)],
    *[(AdaptiveKL, {"clip": value}, "clip") for value in (0, -0.2, math.nan)],
    *[(ThresholdKL, {"factor": value}, "factor") for value in (1.0, 0.5, math.nan)],
    *[(ThresholdKL, {"band": value}, "band") for value in (0.9, 0, math.nan)],
    *[(PIDKL, {"ki": value}, "ki") for value in (0, -0.1, math.nan)],
    *[(PIDKL, {"kp": value}, "kp") for value in (-0.1, math.nan)],
    *[(PIDKL, {"kd": value}, "kd") for value in (-0.1, math.nan)],
    *[(DualKL, {"lr": value}, "lr") for value in (0, -0.05, math.nan)],
]  # fmt: skip


@pytest.mark.parametrize(("cls", "change", "field"), BAD)
def test_bad_values_are_rejected_by_name(cls, change, field):
    with pytest.raises(ConfigError, match=f"^`{field}` got"):
        cls(**(GOOD | change))


@pytest.mark.parametrize("change", [{"coef": -0.1}, {"coef": math.nan}, {"max_coef": 0.01}])
def test_fixed_rejects(change):
    with pytest.raises(ConfigError, match=r"^`coef` got"):
        FixedKL(**({"coef": 0.1} | change))


@pytest.mark.parametrize(
    "change", [{"end_coef": -1.0}, {"end_coef": math.nan}, {"episodes": 0}, {"end_coef": math.inf}]
)
def test_schedule_rejects(change):
    with pytest.raises(ConfigError, match=rf"^`{next(iter(change))}` got"):
        ScheduledKL(**({"coef": 0.1, "end_coef": 0.0, "episodes": 10} | change))


def test_defaults_of_the_clamp():
    assert (AdaptiveKL(**GOOD).min_coef, AdaptiveKL(**GOOD).max_coef) == (MIN_COEF, MAX_COEF) == (1e-6, 1e3)
    assert (FixedKL(0.1).min_coef, FixedKL(0.1).max_coef) == (0.0, math.inf)


def test_build_controller():
    assert build_controller("fixed", coef=0.05) == FixedKL(0.05)
    assert build_controller("fixed", coef=0.05, target=6.0) == FixedKL(0.05)  # the target is ignored
    assert build_controller("adaptive", coef=0.1, target=6.0, horizon=500) == AdaptiveKL(0.1, 6.0, horizon=500)
    assert build_controller("pid", coef=0.1, target=6.0, field="trust", kd=0.2) == PIDKL(0.1, 6.0, kd=0.2)
    assert build_controller("schedule", coef=0.1, target=None, end_coef=0, episodes=5) == ScheduledKL(0.1, 0, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adaptiv", {}, r"^`kl_controller` got 'adaptiv'.*Did you mean 'adaptive'"),
        ("adaptive", {"target": None}, r"^`kl_target` got None with kl_controller='adaptive'"),
        ("dual", {"target": None, "field": "trust"}, r"^`trust_target` got None with trust_controller='dual'"),
        ("adaptive", {"target": -1.0}, r"^`kl_target` got -1.0"),
        ("adaptive", {"coef": 0.0}, r"^`kl_coef` got 0.0.*'fixed'"),
        ("adaptive", {"horizn": 5}, r"^`kl_controller_kwargs` got 'horizn'.*Did you mean 'horizon'"),
        ("adaptive", {"horizon": 0}, r"^`kl_controller_kwargs\['horizon'\]` got 0"),
        ("fixed", {"lr": 0.1, "field": "trust"}, r"^`trust_controller_kwargs` got 'lr'.*'max_coef', 'min_coef'"),
        ("schedule", {"end_coef": 0.1}, r"^`kl_controller_kwargs` lacks episodes"),
        ("schedule", {}, r"^`kl_controller_kwargs` lacks end_coef, episodes"),
    ],
)
def test_errors_of_build_controller_name_the_fields_of_the_configuration(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_controller(name, **({"coef": 0.1, "target": 6.0} | arguments))
