"""The limits of an update, enforced in plain torch without a trainer, and confirmed in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.trust.tabular import Tabular, copies, same
from trl_trustkl.trust.limits import Limits, TrustRegion
from trl_trustkl.trust.measurement import measurement
from trl_trustkl.types import Enforcement

LIMIT = 0.02
ROUNDING = 1e-6  # of a KL in float32

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])


def updated(optimizer: str, size: float):
    """A policy after two updates; the snapshot before the second, all that it covers, and the measurement afterwards."""
    toy = Tabular(optimizer)
    toy.step()
    snapshot, before = toy.snapshot(), toy.everything()
    toy.step(size)
    proposed = toy.measure()
    toy.measured = 0
    return toy, snapshot, before, proposed


@OPTIMIZERS
def test_an_update_within_the_limit_stays_as_it_is(optimizer):
    toy, snapshot, _, proposed = updated(optimizer, 0.01)
    after = toy.everything()
    found = TrustRegion(Limits(max_kl=LIMIT)).enforce(snapshot, toy.measure, proposed)
    assert 0 < toy.dense_kl() < LIMIT
    assert found == Enforcement(proposed.kl, scale=1.0, tries=0, limit=LIMIT, measured=proposed, rejected=None)
    assert same(toy.everything(), after) and toy.measured == 0


def test_an_update_exactly_at_the_limit_is_within_it():
    toy, snapshot, _, proposed = updated("adamw", 1.0)
    limits = Limits(max_kl=proposed.kl, panic_kl=proposed.kl)
    found = TrustRegion(limits).enforce(snapshot, toy.measure, proposed)
    assert found.scale == 1.0 and found.rejected is None and toy.measured == 0


@OPTIMIZERS
@pytest.mark.parametrize("limit", [LIMIT, 1e-4])
def test_an_update_beyond_the_limit_is_shortened_along_its_line(optimizer, limit):
    toy, snapshot, _, proposed = updated(optimizer, 20.0)
    start, end = snapshot.path.start, copies(toy.policy.parameters())
    count = len(start)
    value_and_optimizer, other = toy.everything()[count:], copies(toy.other.parameters())
    assert toy.dense_kl() > 10 * limit
    found = TrustRegion(Limits(max_kl=limit)).enforce(snapshot, toy.measure, proposed)
    assert found.kl_proposed == proposed.kl and found.limit == limit and found.rejected is None
    assert 0 < found.scale < 1 and found.tries == toy.measured and 1 <= found.tries <= 10
    assert found.measured.kl <= limit and found.measured.complete
    assert 0.5 * limit < toy.dense_kl() <= limit + ROUNDING, (
        "the limit does not hold, or the step was shortened far more than necessary"
    )
    assert found.measured.kl == pytest.approx(toy.dense_kl(), rel=1e-3, abs=ROUNDING)
    assert found.measured == toy.measure(), "the reported measurement is not that of the policy as it is now"
    for parameter, a, b in zip(toy.policy.parameters(), start, end, strict=True):
        assert torch.equal(parameter, torch.lerp(a, b, found.scale)), "not on the line from θ_old to θ"
    assert same(toy.everything()[count:], value_and_optimizer), "not only the policy was moved"
    assert same(copies(toy.other.parameters()), other)


def test_where_no_scale_is_within_the_limit_the_policy_goes_back_to_where_it_was():
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    start = copies(snapshot.path.start)

    def measure():
        measured = toy.measure()
        return measured if measured.kl == 0 else measured._replace(kl=max(measured.kl, 2 * LIMIT))

    found = TrustRegion(Limits(max_kl=LIMIT)).enforce(snapshot, measure, proposed)
    assert same(copies(toy.policy.parameters()), start)
    assert found.scale == 0 and found.tries == 10 and found.rejected is None
    assert found.measured.kl == 0 and found.measured.max_ratio == 1
    assert toy.measured == 11, "θ_old was not measured"


@OPTIMIZERS
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_an_update_beyond_panic_kl_is_rolled_back_bit_for_bit(optimizer, limit):
    toy, snapshot, before, proposed = updated(optimizer, 20.0)
    other = copies(toy.other.parameters())
    found = TrustRegion(Limits(max_kl=limit, panic_kl=0.9 * proposed.kl)).enforce(snapshot, toy.measure, proposed)
    assert same(toy.everything(), before)
    assert same(copies(toy.other.parameters()), other)
    assert "panic_kl" in found.rejected and f"{proposed.kl:.3g}" in found.rejected
    assert found.measured.kl == 0 and found.measured.max_ratio == 1 and toy.measured == 1
    wanted = Enforcement(proposed.kl, None if limit is None else 0.0, 0, limit, found.measured, found.rejected)
    assert found == wanted


def test_panic_kl_is_of_what_was_proposed_and_not_of_what_backtracking_makes_of_it():
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    found = TrustRegion(Limits(max_kl=LIMIT, panic_kl=2 * proposed.kl)).enforce(snapshot, toy.measure, proposed)
    assert found.rejected is None and 0 < found.scale < 1


@OPTIMIZERS
@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_an_update_whose_kl_is_not_finite_is_rolled_back(optimizer, limit, weight):
    toy, snapshot, before, _ = updated(optimizer, 1.0)
    with torch.no_grad():
        toy.policy[2].weight[0, 0] = weight
    proposed = toy.measure()
    assert not math.isfinite(proposed.kl)
    found = TrustRegion(Limits(max_kl=limit)).enforce(snapshot, toy.measure, proposed)
    assert same(toy.everything(), before)
    assert "not finite" in found.rejected and not math.isfinite(found.kl_proposed)
    assert found.measured.kl == 0 and found.tries == 0 and found.limit == limit
    assert found.scale == (None if limit is None else 0.0)


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_an_update_that_was_rolled_back_already_is_only_reported(limit):
    toy, snapshot, _, _ = updated("adamw", 20.0)
    snapshot.restore()
    proposed, before = toy.measure(), toy.everything()
    toy.measured = 0
    found = TrustRegion(Limits(max_kl=limit, panic_kl=1.0)).enforce(
        snapshot, toy.measure, proposed, rejected="the loss is not finite"
    )
    scale = None if limit is None else 0.0
    assert found == Enforcement(0.0, scale, 0, limit, measured=proposed, rejected="the loss is not finite")
    assert toy.measured == 0 and same(toy.everything(), before)


def test_without_a_limit_nothing_is_enforced():
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    after = toy.everything()
    found = TrustRegion(Limits()).enforce(snapshot, toy.measure, proposed)
    assert found == Enforcement(proposed.kl, scale=None, tries=0, limit=None, measured=proposed, rejected=None)
    assert same(toy.everything(), after) and toy.measured == 0


def test_a_batch_without_a_token_is_within_every_limit():
    toy, snapshot, _, _ = updated("adamw", 20.0)
    nothing = measurement(*[torch.zeros(2, 3)] * 3, torch.zeros(2, 3, dtype=torch.bool), complete=True)
    found = TrustRegion(Limits(max_kl=0.0, panic_kl=0.0)).enforce(snapshot, toy.measure, nothing)
    assert found.scale == 1.0 and found.measured.tokens == 0 and found.rejected is None
