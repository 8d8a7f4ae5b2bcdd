"""Enforcement on windows whose KL is a closed form of one weight: (w − w₀)²."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trl_trustkl.callbacks.enforcer import NO_TOKENS, Enforcer
from trl_trustkl.parallel.sharding import REPLICATED, Replicated
from trl_trustkl.trust.limits import Limits
from trl_trustkl.trust.measurement import measurement

LIMIT = 0.01
START, RATE = 1.0, 0.1


class ObservedModel:
    """Counts how often it is put into the state in which it is measured."""

    entered, inside = 0, False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def without_noise(self) -> Any:
        assert not self.inside
        self.entered, self.inside = self.entered + 1, True
        yield
        self.inside = False


class Batch:
    """A window whose tokens each have the KL curvature·(w − w₀)² from the current weight w."""

    def __init__(self, model: nn.Linear, observed: ObservedModel, curvature: float, tokens: int = 3) -> None:
        self.model, self.observed, self.curvature, self.tokens = model, observed, curvature, tokens
        self.seconds, self.enforcement = 0.0, None

    def kl_at(self, weight: float) -> float:
        return self.curvature * (weight - START) ** 2

    def measure(self) -> Any:
        assert self.observed.inside
        column = torch.full(
            (1, max(self.tokens, 1)), self.kl_at(float(self.model.weight.detach())), dtype=torch.float64
        )
        mask = torch.arange(column.shape[1]).unsqueeze(0) < self.tokens
        return measurement(column, column, column, mask, complete=True)


class Run:
    """A model of one weight, its optimizer with momentum, and an enforcer."""

    def __init__(self, *, sharding: Replicated = REPLICATED, **limits: float) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, START)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)
        self.observed = ObservedModel(self.model)
        trainer = SimpleNamespace(model=self.model, model_wrapped=self.model, ref_model=None, optimizer=self.optimizer)
        self.enforcer = Enforcer(trainer, self.observed, Limits(**limits), sharding=sharding)
        self.enforcer.begin()

    @property
    def weight(self) -> float:
        return float(self.model.weight.detach())

    def windows(self, *curvatures: float, **options: Any) -> list[Batch]:
        return [Batch(self.model, self.observed, each, **options) for each in curvatures]

    def step(self, change: float) -> None:
        """An optimizer step to w + change; the first one makes the momentum."""
        self.model.weight.grad = torch.full((1, 1), -change / self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()


def test_without_limits_it_only_measures():
    run = Run()
    (window,) = run.windows(1.0)
    run.enforcer.take_snapshot()
    assert run.enforcer._snapshot is None and not run.enforcer.limited
    run.step(0.5)
    run.enforcer.enforce([window])
    found = window.enforcement
    assert run.weight == pytest.approx(1.5)
    assert (found.scale, found.tries, found.limit, found.rejected) == (None, 0, None, None)
    assert found.kl_proposed == found.measured.kl == pytest.approx(0.25) and run.observed.entered == 1


class StepsInBackward(Replicated):
    steps_in_backward = True


@pytest.mark.parametrize("limits", [{}, {"max_kl": LIMIT}])
def test_where_the_step_comes_before_the_old_policy_is_measured_its_weights_are_set_for_that(limits):
    run = Run(sharding=StepsInBackward(), **limits)
    (window,) = run.windows(1.0)
    run.enforcer.take_snapshot()
    assert (run.enforcer._snapshot is None) == (not limits)
    run.step(0.5)
    proposed = run.weight
    with run.enforcer.measuring([window]), run.enforcer.before_step():
        assert run.weight == START and window.measure().kl == 0.0
    assert run.weight == proposed
    run.enforcer.enforce([window])
    assert (run.weight == proposed) == (not limits) and window.enforcement.kl_proposed == pytest.approx(0.25)
    assert (window.enforcement.scale is None) == (not limits)


def test_where_the_old_policy_is_measured_before_the_step_nothing_is_set():
    run = Run(max_kl=LIMIT)
    run.enforcer.take_snapshot()
    run.step(0.5)
    with run.enforcer.before_step():
        assert run.weight == pytest.approx(START + 0.5)


@pytest.mark.parametrize("change", [0.05, 0.1])
def test_a_step_within_the_limit_is_kept_bit_for_bit(change):
    run = Run(max_kl=change**2 * 1.0001)
    (window,) = run.windows(1.0)
    run.enforcer.take_snapshot()
    run.step(change)
    proposed = run.weight
    run.enforcer.enforce([window])
    assert run.weight == proposed and window.enforcement.scale == 1.0 and window.enforcement.tries == 0


def test_the_largest_kl_decides_how_far_a_step_is_shortened():
    run = Run(max_kl=LIMIT)
    flat, steep, middle = run.windows(0.1, 4.0, 1.0)
    run.enforcer.take_snapshot()
    run.step(1.0)
    momentum = run.optimizer.state[run.model.weight]["momentum_buffer"].clone()
    run.enforcer.enforce([flat, steep, middle])
    scale = run.weight - START
    assert 0.8 * LIMIT <= 4.0 * scale**2 <= LIMIT
    for window in (flat, steep, middle):
        found = window.enforcement
        assert found.scale == pytest.approx(scale, rel=1e-6) and found.limit == LIMIT and found.rejected is None
        assert found.kl_proposed == pytest.approx(window.curvature)
        assert found.measured.kl == pytest.approx(window.kl_at(run.weight), rel=1e-6), "measured at another scale"
    assert torch.equal(run.optimizer.state[run.model.weight]["momentum_buffer"], momentum)


@pytest.mark.parametrize("curvature", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [{"max_kl": LIMIT}, {"panic_kl": 1.0}])
def test_a_kl_that_is_not_finite_in_any_window_rolls_back(curvature, limits):
    run = Run(**limits)
    good, bad = run.windows(1e-6, curvature)
    run.enforcer.take_snapshot()
    run.step(0.01)
    run.enforcer.enforce([good, bad])
    assert run.weight == START and run.model.weight not in run.optimizer.state
    assert "not finite" in good.enforcement.rejected and good.enforcement.rejected == bad.enforcement.rejected
    assert good.enforcement.kl_proposed == pytest.approx(1e-10) and not math.isfinite(bad.enforcement.kl_proposed)
    assert good.enforcement.measured.kl == 0.0


def test_panic_restores_weight_and_momentum_bit_for_bit_and_leaves_the_scheduled_rate():
    run = Run(max_kl=LIMIT, panic_kl=0.5)
    run.step(0.02)
    weight, momentum = run.weight, run.optimizer.state[run.model.weight]["momentum_buffer"].clone()
    run.enforcer.take_snapshot()
    run.step(0.3)
    run.optimizer.param_groups[0]["lr"] = RATE / 2  # what the scheduler made of it in the window
    run.step(2.0)
    (window,) = run.windows(1.0)
    run.enforcer.enforce([window])
    assert run.weight == weight
    assert torch.equal(run.optimizer.state[run.model.weight]["momentum_buffer"], momentum)
    assert run.optimizer.param_groups[0]["lr"] == RATE / 2
    found = window.enforcement
    assert "is above panic_kl = 0.5" in found.rejected and found.scale == 0.0 and found.tries == 0
    assert found.kl_proposed > 0.5 and found.measured.kl == pytest.approx(0.02**2, rel=1e-5)


def test_panic_without_a_hard_limit_has_no_scale():
    run = Run(panic_kl=0.5)
    (window,) = run.windows(1.0)
    run.enforcer.take_snapshot()
    run.step(0.6)
    run.enforcer.enforce([window])
    assert run.weight == pytest.approx(1.6) and window.enforcement.rejected is None and window.enforcement.scale is None
    run.step(0.6)
    run.enforcer.enforce([window])
    assert run.weight == START and window.enforcement.rejected is not None and window.enforcement.scale is None


@pytest.mark.parametrize(("limits", "kept"), [({"max_kl": 1.0}, False), ({"panic_kl": 1.0}, False), ({}, True)])
def test_a_window_without_a_token_is_rolled_back_where_a_limit_is_set(limits, kept):
    run = Run(**limits)
    (empty,) = run.windows(1.0, tokens=0)
    run.enforcer.take_snapshot()
    run.step(0.1)
    run.enforcer.enforce([empty])
    assert (run.weight != START) == kept
    assert empty.enforcement.rejected == (None if kept else NO_TOKENS) and empty.enforcement.measured.tokens == 0


def test_a_window_without_a_token_beside_one_with_tokens_does_not_decide():
    run = Run(max_kl=LIMIT)
    (empty,), (full,) = run.windows(1.0, tokens=0), run.windows(1.0)
    run.enforcer.take_snapshot()
    run.step(1.0)
    run.enforcer.enforce([empty, full])
    assert 0.8 * LIMIT <= (run.weight - START) ** 2 <= LIMIT and full.enforcement.rejected is None
    assert empty.enforcement.measured.tokens == 0 and full.enforcement.measured.tokens == 3


def test_a_window_may_be_enforced_repeatedly_towards_one_start():
    run = Run(max_kl=LIMIT)
    (window,) = run.windows(1.0)
    run.enforcer.take_snapshot()
    for _ in range(3):
        run.step(0.5)
        run.enforcer.enforce([window])
        assert 0 < (run.weight - START) ** 2 <= LIMIT
    run.enforcer.drop_snapshot()
    run.step(0.5)
    run.enforcer.enforce([window])
    assert window.enforcement.scale is None and (run.weight - START) ** 2 > LIMIT


def test_the_time_of_measuring_is_shared_by_its_windows():
    run = Run()
    windows = run.windows(1.0, 1.0)
    started = time.perf_counter()
    with run.enforcer.measuring(windows):
        time.sleep(0.02)
    assert windows[0].seconds == pytest.approx(windows[1].seconds, rel=0.1)
    assert 0.02 <= windows[0].seconds + windows[1].seconds <= time.perf_counter() - started
    assert run.enforcer.measure(windows[0]).kl == 0.0 and windows[0].seconds > windows[1].seconds
