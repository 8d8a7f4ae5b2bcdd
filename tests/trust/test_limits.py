"""The limits of an update, enforced in plain torch without a trainer, and confirmed in float64."""

from __future__ import annotations

import copy
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


# -- several limits ----------------------------------------------------------------------------------------------------

FIELDS = {
    "max_kl": ("trust_max_kl", "kl", "limit"),
    "max_kl_token": ("trust_max_kl_token", "kl_max", "limit_token"),
    "max_kl_response": ("trust_max_kl_response", "kl_response_max", "limit_response"),
}


@OPTIMIZERS
@pytest.mark.parametrize("name", FIELDS)
def test_each_limit_holds_by_itself_and_is_used(optimizer, name):
    field, measured, recorded = FIELDS[name]
    toy, snapshot, _, proposed = updated(optimizer, 20.0)
    limit = getattr(proposed, measured) / 30
    found = TrustRegion(Limits(**{name: limit})).enforce(snapshot, toy.measure, proposed)
    assert 0 < found.scale < 1 and found.decided == field and getattr(found, recorded) == limit
    kl, token, response = toy.dense_kls()
    dense = {"max_kl": kl, "max_kl_token": token, "max_kl_response": response}[name]
    assert 0.5 * limit < dense <= limit + ROUNDING
    assert getattr(found.measured, measured) == pytest.approx(dense, rel=1e-3, abs=ROUNDING)


@pytest.mark.parametrize("tightest", FIELDS)
def test_of_several_limits_all_hold_and_the_record_says_which_decided(tightest):
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    limits = {
        name: getattr(proposed, measured) / (90 if name == tightest else 30)
        for name, (_, measured, _) in FIELDS.items()
    }
    found = TrustRegion(Limits(**limits)).enforce(snapshot, toy.measure, proposed)
    assert found.decided == FIELDS[tightest][0] and 0 < found.scale < 1
    for name, (_, measured, _) in FIELDS.items():
        assert getattr(found.measured, measured) <= limits[name]
    assert getattr(found.measured, FIELDS[tightest][1]) > 0.5 * limits[tightest]


def test_the_limit_that_decided_is_the_one_next_to_the_scale_kept():
    """At the end of the step the mean exceeds its limit most; but the step is kept up to where a token reaches its limit."""
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    end = copies(toy.policy.parameters())[0]

    def scale() -> float:
        start, now = snapshot.path.start[0], next(toy.policy.parameters()).detach()
        return float((now - start).norm() / (end - start).norm())

    def measure():
        return proposed._replace(kl=0.1 * scale() ** 4, kl_max=0.5 * scale() ** 2)

    limits = Limits(max_kl=0.01, max_kl_token=0.1)
    assert limits.used(measure()) == pytest.approx({"trust_max_kl": 10, "trust_max_kl_token": 5})
    found = TrustRegion(limits).enforce(snapshot, measure, measure())
    assert found.decided == "trust_max_kl_token" and 0.9 * 0.2**0.5 < found.scale <= 0.2**0.5


def test_an_update_within_all_limits_was_decided_by_none():
    toy, snapshot, _, proposed = updated("adamw", 20.0)
    limits = Limits(proposed.kl, None, proposed.kl_max, proposed.kl_response_max)
    found = TrustRegion(limits).enforce(snapshot, toy.measure, proposed)
    assert (found.scale, found.tries, found.decided) == (1.0, 0, None) and toy.measured == 0


def test_a_value_above_a_limit_by_one_rounding_is_above_it():
    proposed = updated("adamw", 1.0)[3]
    for limit in (0.1, 0.02, 1 / 3, 5e-4, math.nextafter(2.0, 0.0)):
        at, above = proposed._replace(kl=limit), proposed._replace(kl=math.nextafter(limit, 9))
        used = Limits(max_kl=limit).used
        assert used(at)["trust_max_kl"] == 1.0 and used(above)["trust_max_kl"] > 1.0
    assert Limits(max_kl=1.0).used(proposed._replace(kl=math.nan)) == {"trust_max_kl": math.inf}


class ToReference:
    """A policy after a step from its reference, and an update that goes further, or back to the reference."""

    def __init__(self, *, towards: bool) -> None:
        self.toy = Tabular("adamw")
        self.reference = copy.deepcopy(self.toy.policy).requires_grad_(False)
        self.toy.step(20.0)
        self.snapshot = self.toy.snapshot()
        with torch.no_grad():
            for parameter, start in zip(self.toy.policy.parameters(), self.reference.parameters(), strict=True):
                parameter.copy_(torch.lerp(start, parameter, 0.0 if towards else 2.0))
        self.start = self.kl(self.toy.old)
        self.proposed = self.measure()

    @torch.no_grad()
    def kl(self, policy: torch.nn.Module) -> float:
        logps, ref = (model(self.toy.features).log_softmax(-1) for model in (policy, self.reference))
        return float(((logps.exp() * (logps - ref)).sum(-1) * self.toy.mask).sum(1).double().mean())

    def measure(self):
        with torch.no_grad():
            return self.toy.measure()._replace(anchor_kl=self.kl(self.toy.policy), anchor_start=self.start)

    def enforced(self, limit: float, **others: float):
        limits = Limits(anchor_max_kl=limit, **others)
        return TrustRegion(limits).enforce(self.snapshot, self.measure, self.proposed)


def test_the_kl_to_the_reference_ends_within_its_limit():
    away = ToReference(towards=False)
    limit = away.start + 0.3 * (away.proposed.anchor_kl - away.start)
    assert 0 < away.start < limit < away.proposed.anchor_kl
    found = away.enforced(limit)
    assert 0 < found.scale < 1 and found.decided == "anchor_max_kl" and found.limit_anchor == limit
    assert limit - 0.2 * (limit - away.start) <= found.measured.anchor_kl <= limit
    assert found.measured.anchor_kl == away.kl(away.toy.policy)


def test_an_update_from_above_the_limit_must_not_increase_the_kl():
    away = ToReference(towards=False)
    limit = 0.5 * away.start
    found = away.enforced(limit)
    assert found.scale == 0 and found.rejected is None and found.decided == "anchor_max_kl"
    assert found.limit_anchor == found.measured.anchor_kl == away.start > limit
    assert found.tries <= 3 and found.measured.kl == 0


def test_an_update_from_above_the_limit_towards_the_reference_is_kept():
    back = ToReference(towards=True)
    found = back.enforced(0.1 * back.start)
    assert found.scale == 1 and found.decided is None and found.measured.anchor_kl < 1e-6
    assert found.limit_anchor == back.start


def test_the_anchor_and_the_trust_region_are_held_together():
    away = ToReference(towards=False)
    limit = away.start + 0.9 * (away.proposed.anchor_kl - away.start)
    found = away.enforced(limit, max_kl=away.proposed.kl / 50)
    assert found.decided == "trust_max_kl" and found.measured.kl <= away.proposed.kl / 50
    assert found.measured.anchor_kl <= limit


@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_without_a_finite_kl_to_the_reference_an_update_is_rejected(start):
    away = ToReference(towards=False)
    away.start = start
    away.proposed = away.measure()
    found = away.enforced(1.0)
    assert "π_ref" in found.rejected and found.scale == 0.0 and found.measured.kl == 0


def test_a_proposal_infinitely_far_from_the_reference_is_shortened():
    away = ToReference(towards=False)
    away.proposed = away.proposed._replace(anchor_kl=math.inf)
    found = away.enforced(0.5 * (away.start + away.kl(away.toy.policy)))
    assert 0 < found.scale < 1 and found.decided == "anchor_max_kl"
