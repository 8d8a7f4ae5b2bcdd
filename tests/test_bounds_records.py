"""The share that each mechanism took of an update, and the record built from measurements written by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from trl_trustkl.bounds import binding, binding_by_outcome, binding_shares, build_record, guarantees
from trl_trustkl.kl_ball import TokenProjection
from trl_trustkl.records import CertificateRecord
from trl_trustkl.surrogates import ClipRuleName, build_surrogate
from trl_trustkl.types import AnchorMeasurement, Enforcement, EpochStats, Measurement, RolloutSummary, UpdateStats

IDLE = EpochStats(
    policy_loss=0.1, value_loss=0.2, gated=0.0, gated_low=0.0, gated_high=0.0, clip_fraction=0.0, penalty=0.0,
    value_gated=0.3, approx_kl=0.01, ratio=1.0, ratio_var=0.0,
)  # fmt: skip


ANCHOR = AnchorMeasurement(coef=0.05, kl=5.5, kl_exact=5.0, kl_stderr=0.4, share=0.0, kl_per_token=0.27)


STATS = UpdateStats(
    total=IDLE, epochs=[IDLE], steps=4, planned_steps=4, grad_norm=2.0, grad_scale=1.0, stopped=False, refused=None
)


MEASURED = Measurement(
    kl=0.02,
    kl_max=0.3,
    kl_response_max=0.5,
    tv=0.05,
    max_ratio=7.0,
    ratio_quantiles={"0.5": 1.0},
    tokens=64,
    complete=True,
)


CERTIFICATE = CertificateRecord(0.02, 0.01, 0.3, -0.28, "adaptive", 0.001)


OFF = Enforcement(kl_proposed=0.02, scale=None, tries=0, limit=None)


SUMMARY = RolloutSummary(
    score=0.6, length=20.5, eos_rate=0.25, entropy=2.5, sampler_kl=1e-6, explained_variance=0.4,
    rewards={"judge": 0.6}, sampler_ratio_min=0.2, sampler_ratio_max=4.5, sampler_truncated=0.125,
    engine="Elsewhere",
)  # fmt: skip


def stats(**changes: object) -> UpdateStats:
    total = {name: changes.pop(name) for name in IDLE._fields if name in changes}
    return STATS._replace(total=IDLE._replace(**total), **changes)


def test_nothing_bound_an_idle_update() -> None:
    shares = binding_shares(ANCHOR, STATS, OFF, 1.0)
    assert shares == dict.fromkeys(
        ("anchor", "clip", "response_mask", "penalty", "stop", "backtrack", "grad_norm", "lr"), 0.0
    )
    assert binding(shares) == "none"


@pytest.mark.parametrize(
    ("name", "share", "anchor", "update", "enforcement", "lr_factor"),
    [
        ("anchor", 0.4, ANCHOR._replace(share=0.4), STATS, OFF, 1.0),
        ("clip", 0.3, ANCHOR, stats(gated=0.3), OFF, 1.0),
        ("response_mask", 0.35, ANCHOR, stats(masked=0.35, masked_responses=0.5), OFF, 1.0),
        ("penalty", 0.2, ANCHOR, stats(penalty=0.2), OFF, 1.0),
        ("stop", 0.75, ANCHOR, stats(steps=1, stopped=True), OFF, 1.0),
        ("backtrack", 0.9, ANCHOR, STATS, Enforcement(0.2, scale=0.1, tries=2, limit=0.02), 1.0),
        ("grad_norm", 0.6, ANCHOR, stats(grad_scale=0.4), OFF, 1.0),
        ("lr", 0.5, ANCHOR, STATS, OFF, 0.5),
    ],
)
def test_each_mechanism_in_turn(name, share, anchor, update, enforcement, lr_factor) -> None:
    shares = binding_shares(anchor, update, enforcement, lr_factor)
    assert shares.pop(name) == pytest.approx(share)
    assert set(shares.values()) == {0.0}
    assert binding(shares | {name: share}) == name
    # also where every other mechanism took a smaller share
    assert binding(dict.fromkeys(shares, share / 2) | {name: share}) == name


def test_the_threshold_is_one_per_cent() -> None:
    assert binding({"anchor": 0.0, "clip": 0.0099}) == "none"
    assert binding({"anchor": 0.0, "clip": 0.01}) == "clip"


@pytest.mark.parametrize(("rescaled", "found"), [(False, "grad_norm"), (True, "clip")])
def test_the_factor_of_the_norm_is_no_share_where_the_optimizer_rescales(rescaled: bool, found: str) -> None:
    shares = {"anchor": 0.0, "clip": 0.2, "grad_norm": 0.97}
    assert binding(shares, rescaled=rescaled) == found
    assert binding(shares | {"clip": 0.0}, rescaled=rescaled) == ("none" if rescaled else "grad_norm")


@pytest.mark.parametrize(
    ("counterfactual", "found"),
    [
        ({"anchor": 0.02, "clip": 0.04, "value_clip": 0.03, "lr": None}, "clip"),
        ({"anchor": 0.02, "clip": 0.01, "value_clip": 0.03}, "value_clip"),
        ({"anchor": 0.02, "clip": 0.001}, "none"),
        ({"anchor": 0.0201}, "none"),
        ({"anchor": 0.0203}, "anchor"),
        ({"anchor": 0.0, "clip": None}, "none"),
    ],
)
def test_a_counterfactual_says_what_bound_the_update(counterfactual: dict, found: str) -> None:
    """The KL as it was is 0.02; less than 1 % of what it would have been does not count."""
    assert binding_by_outcome(0.02, counterfactual) == found


def test_mechanisms_that_take_no_share() -> None:
    shares = binding_shares(ANCHOR._replace(share=None), stats(steps=1), OFF._replace(scale=1.0, limit=0.1), 2.0)
    assert set(shares.values()) == {
        0.0
    }  # anchor not in the reward; fewer steps but no stop; a step kept in full; a raised learning rate
    assert binding_shares(ANCHOR, stats(steps=0, planned_steps=0, stopped=True), OFF, 1.0)["stop"] == 0.0


@pytest.mark.parametrize(
    ("limit", "complete", "kl", "expected"),
    [
        (0.05, True, 0.02, 0.05),
        (0.05, True, 0.05, 0.05),
        (0.05, True, 0.0501, None),
        (0.05, False, 0.02, None),
        (None, True, 0.02, None),
        (None, False, 0.0, None),
    ],
)
def test_guaranteed_needs_a_limit_the_entire_batch_and_the_kl_within_it(limit, complete, kl, expected) -> None:
    measured = MEASURED._replace(kl=kl, complete=complete)
    assert guarantees(measured, OFF._replace(limit=limit, scale=None if limit is None else 1.0)).mean == expected


def args(**changes: object) -> SimpleNamespace:
    settings = {
        "kl_estimator": "k3", "kl_placement": "reward", "kl_target": 6.0, "clip_rule": "ppo", "low": 0.2, "high": 0.28,
        "anchor_max_kl": 7.0, "response_mask_kl": None, "num_ppo_epochs": 2, "value_range": 0.2, "norm_limit": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**settings | changes)


def record(config: SimpleNamespace, enforcement: Enforcement = OFF, update: UpdateStats = STATS):
    return build_record(
        config,
        update=3,
        episode=48,
        lr=1e-4,
        lr_factor=1.0,
        trust_coef=0.7,
        refused=None,
        seconds={"total": 1.5},
        rollout=SUMMARY,
        anchor=ANCHOR._replace(share=0.25),
        stats=update,
        measured=MEASURED,
        enforcement=enforcement,
        certificate=CERTIFICATE,
    )


def test_a_record_holds_what_was_measured() -> None:
    update = stats(gated=0.2, gated_low=0.15, gated_high=0.05, steps=3, stopped=True, masked=0.1, masked_responses=0.2)
    line = record(
        args(response_mask_kl=0.07), Enforcement(0.09, scale=0.4, tries=3, limit=0.03, decided="trust_max_kl"), update
    )
    assert (line.update, line.episode, line.lr, line.refused, line.seconds) == (3, 48, 1e-4, None, {"total": 1.5})
    assert (line.score, line.length, line.eos_rate, line.entropy) == (0.6, 20.5, 0.25, 2.5)
    assert line.anchor == ("k3", "reward", "biased", 0.05, 6.0, 5.5, 5.0, 0.4, 0.25, 0.27, None, None, 7.0, None, None)
    assert line.trust._asdict() == {
        "rule": "ppo", "low": 0.2, "high": 0.28, "gated": 0.2, "gated_low": 0.15, "gated_high": 0.05, "coef": 0.7,
        "epochs": 1.5, "stopped": True, "kl": 0.02, "kl_max": 0.3, "kl_proposed": 0.09, "tv": 0.05, "max_ratio": 7.0,
        "ratio_quantiles": {"0.5": 1.0}, "scale": 0.4, "tries": 3, "limit": 0.03, "guaranteed": 0.03,
        "kl_response_max": 0.5, "limit_token": None, "limit_response": None, "guaranteed_token": None,
        "guaranteed_response": None, "decided": "trust_max_kl", "certificate": CERTIFICATE,
        "mask_limit": 0.07, "masked": 0.1, "masked_responses": 0.2,
    }  # fmt: skip
    assert line.value == (0.2, 0.3, 0.4)
    assert line.gradient == (2.0, 1.0, 1.0)
    assert line.rollout == ("Elsewhere",)
    assert line.sampler == (1e-6, 0.2, 4.5, 0.125) and line.rewards == {"judge": 0.6}
    assert line.binding == "backtrack"
    assert line.shares == pytest.approx({
        "anchor": 0.25, "clip": 0.2, "response_mask": 0.1, "penalty": 0.0, "stop": 0.25, "backtrack": 0.6,
        "grad_norm": 0.0, "lr": 0.0,
    })  # fmt: skip


@pytest.mark.parametrize("rule", get_args(ClipRuleName))
def test_a_range_is_recorded_only_if_the_rule_uses_it(rule: str) -> None:
    """Whether a rule has a range is measured: whether `gated` depends on it."""
    log_ratio, mask = torch.linspace(-3, 3, 25).repeat(2)[:, None], torch.ones(50, 1, dtype=torch.bool)
    advantages = torch.cat([torch.ones(25, 1), -torch.ones(25, 1)])
    old_logp = torch.full_like(log_ratio, -4.0)
    projection = TokenProjection(old_logp + log_ratio / 2, log_ratio.abs(), log_ratio * 0 + 0.5, log_ratio / 9)
    narrow, wide = (
        build_surrogate(rule, low=end, high=end)(log_ratio, advantages, mask, old_logp, projection).gated
        for end in (0.1, 0.9)
    )
    trust = record(args(clip_rule=rule)).trust
    ranged = not torch.equal(narrow, wide)
    assert (math.isfinite(trust.low), math.isfinite(trust.high)) == (ranged, ranged)


def test_mechanisms_that_are_off_are_null() -> None:
    line = record(args(value_range=None, norm_limit=None))
    assert line.value.clip is None and line.gradient.max_norm is None
    assert line.trust.guaranteed is None and line.trust.limit is None and line.trust.scale is None
    assert line.binding == "anchor"
