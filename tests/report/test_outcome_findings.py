"""Each finding about outcomes, on counterfactuals that show it and on similar ones that do not."""

from __future__ import annotations

import pytest

from tests.example_runs import trl_run
from tests.report.cases import Case, Changes, checks_of, own
from trl_trustkl.report import outcome_findings
from trl_trustkl.report.findings import FINDINGS, find

OWN = own(outcome_findings)


def without(**kl: float | None) -> Changes:
    """A counterfactual of every update; as it was, the KL of a healthy row is 0.01."""
    return {"counterfactual": kl}


def limited(kl: float | None, share: float = 0.97) -> Changes:
    """The same of updates whose gradient the limit on its norm scaled down."""
    return {**without(grad_norm=kl), "gradient__scale": 1 - share}


NO_TARGET = {"anchor__coef": 0.4, "anchor__target": None}

CASES: list[Case] = [
    # finding, records that show it, similar records that do not, part of the evidence, part of the advice
    ("grad_norm_without_effect", limited(0.0100099, 0.19), limited(0.0100101, 0.19),
     "In 12 of 12 attributed updates, the limit scaled the gradient down, by 19 % on average. Without it, the KL(π_old‖π) of "
     "these updates would have differed by at most 0.099 %", "Set max_grad_norm=0"),
    ("grad_norm_without_effect", limited(0.0099901, 0.19), limited(0.0099899, 0.19), "at most 0.099 %", "max_grad_norm=0"),
    ("grad_norm_without_effect", limited(0.0109, 0.21), limited(0.0111, 0.21),
     "would have been 1.09 times as large on average (geometric mean)", "max_grad_norm=0"),
    ("grad_norm_without_effect", limited(0.0092, 0.21), limited(0.0092, 0.19), "0.92 times as large", "max_grad_norm=0"),
    ("grad_norm_without_effect", limited(0.01, 0.051), limited(0.01, 0.049), "by 5 % on average", "max_grad_norm=0"),
    ("grad_norm_without_effect", limited(0.01), {**without(), "gradient__scale": 0.03}, "at most 0 %", "max_grad_norm=0"),
    ("clip_halves_updates", without(clip=0.0201), without(clip=0.0199),
     "Without the clip, the KL(π_old‖π) of an update would have been 2.01 times as large (the median of 12 attributed updates)",
     "num_ppo_epochs=1 instead of 2"),
    ("clip_halves_updates", {**without(clip=0.04), "trust__epochs": 6.0}, without(clip=None),
     "4 times as large", "num_ppo_epochs=3 instead of 6"),
    ("clip_halves_updates", {**without(clip=0.04), "trust__epochs": 1.0}, {**without(clip=0.04), "trust__kl": 0.03},
     "4 times as large", "learning_rate=0.0005, 0.5 times the present one, which is at most 0.001, so"),
    ("updates_go_further", without(clip=0.0089), without(clip=0.0091),
     "Without the clip, the KL(π_old‖π) of an update would have been 0.89 times as large", "trust_max_kl=0.0089"),
    ("updates_go_further", without(penalty=0.008, value_clip=0.007, stop=0.02), without(anchor=0.008, lr=0.008),
     "Without the penalty on KL(π_old‖π), the KL(π_old‖π) of an update would have been 0.8 times as large (the median of 12 "
     "attributed updates). Without the clip of the value, the KL", "trust_max_kl=0.007 (nats per token), the median KL without "
     "the clip of the value"),
    ("anchor_pulls_more_than_reward", without(anchor=0.0049), without(anchor=0.0051),
     "Without the anchor, the KL(π_old‖π) of an update would have been 0.49 times as large", "kl_target=9"),
    ("anchor_pulls_more_than_reward", {**without(anchor=0.0), **NO_TARGET}, {**without(anchor=0.02), **NO_TARGET},
     "0 times as large", "kl_coef=0.2"),
]  # fmt: skip


test_every_finding_has_a_case, test_findings = checks_of(OWN, CASES)


@pytest.mark.parametrize("name", sorted(OWN - {"grad_norm_without_effect"}))
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_attributed_updates_show_nothing(run_of, name: str, count: int) -> None:
    """The other updates are without a counterfactual, or were measured without a result."""
    shows = next(shows for case, shows, *_ in CASES if case == name)

    def on(updates: int) -> Changes:
        return {**shows, "counterfactual": lambda p: shows["counterfactual"] if 12 * p < updates + 0.5 else None}

    assert FINDINGS[name](run_of(**on(count))) is None
    assert FINDINGS[name](run_of(**on(3))) is not None
    assert FINDINGS[name](run_of(**on(3), trust__kl=lambda p: 0.0 if 12 * p < 1.5 else 0.01)) is None


@pytest.mark.parametrize("name", sorted(OWN))
def test_records_without_counterfactuals_show_nothing(run_of, tmp_path, name: str) -> None:
    """Those of an earlier version, of TRL's trainers, and of a run in which every mechanism is off."""
    assert FINDINGS[name](run_of(gradient__scale=0.03)) is None
    assert FINDINGS[name](trl_run(tmp_path, gradient__scale=0.03)) is None
    off = dict.fromkeys(("anchor", "clip", "grad_norm"))
    assert FINDINGS[name](run_of(gradient__scale=0.03, counterfactual=off)) is None


def test_the_median_decides(run_of) -> None:
    """One update that went much further does not make a finding, nor do five of twelve."""
    for updates, found in ((1, []), (5, []), (7, ["clip_halves_updates"])):
        run = run_of(counterfactual=lambda p, n=updates: {"clip": 0.5 if 12 * p < n + 0.5 else 0.01})
        assert [finding.name for finding in find(run)] == found


@pytest.mark.parametrize(("kl", "count", "found"), [(0.01, 1, True), (0.0105, 2, False), (0.0105, 3, True)])
def test_an_unchanged_update_is_enough_and_an_average_needs_three(run_of, kl, count, found) -> None:
    counterfactual = lambda p: {"grad_norm": kl} if 12 * p < count + 0.5 else None  # noqa: E731
    finding = FINDINGS["grad_norm_without_effect"](run_of(gradient__scale=0.03, counterfactual=counterfactual))
    assert (finding is not None) == found


def test_a_limit_that_changed_a_single_update_has_an_effect(run_of) -> None:
    changes = {"gradient__scale": 0.03, "counterfactual": lambda p: {"grad_norm": 0.05 if p == 1 else 0.01}}
    assert FINDINGS["grad_norm_without_effect"](run_of(**changes)) is None
    some = changes | {"gradient__scale": lambda p: 0.03 if p < 0.4 else 1.0}
    finding = FINDINGS["grad_norm_without_effect"](run_of(**some))
    assert finding is not None and "In 4 of 12 attributed updates" in finding.evidence
