"""The summary of a run in words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.example_runs import rising, trl_run
from trl_trustkl.report.findings import FINDINGS
from trl_trustkl.report.schema import Run
from trl_trustkl.report.series import shares
from trl_trustkl.report.summary import summarise
from trl_trustkl.report.tables import settings


def words(run: Run) -> dict[str, str]:
    return dict(summarise(run))


def test_which_mechanism_bound_how_many(run_of) -> None:
    said = words(run_of(binding=lambda p: "clip" if p > 0.3 else "none"))
    assert said["What limited the updates"] == (
        "The mechanism that intervened most was the clip in 9 of 12 updates and none (every share was below 1 %) in 3."
    )


def test_a_renewed_reference_is_mentioned_with_the_kl(run_of) -> None:
    renewed = " (to the reference as renewed, 3 times in the run)"
    run = run_of(anchor__renewed=lambda p: round(12 * p) % 4 == 0)
    assert any(renewed in text for text in words(run).values())
    assert not any(renewed in text for text in words(run_of()).values())


LIMITED = "What limited the updates"


def test_the_kl_without_each_mechanism_is_compared_with_the_kl_as_it_was(run_of) -> None:
    """Geometric means: √(1 · 4) = 2 for the clip, √(0.4 · 0.9) = 0.6 for the anchor, √(2 · 0.5) = 1 for the early stop."""
    without = [
        {"anchor": 0.004, "clip": 0.01, "stop": 0.02, "grad_norm": 0.010099, "penalty": None, "value_clip": 0.01},
        {"anchor": 0.009, "clip": 0.04, "stop": 0.005, "grad_norm": 0.00995, "penalty": None, "value_clip": 0.01},
    ]
    said = words(run_of(2, counterfactual=lambda p: without[round(2 * p) - 1], trust__kl=0.01, binding="grad_norm"))
    assert said[LIMITED] == (
        "In 2 attributed updates, the KL(π_old‖π) of an update would have been 2 times as large without the clip and 0.6 times "
        "as large without the anchor (geometric means); without the limit on the gradient's norm or the clip of the value, it "
        "would have been the same; without the early stop, it would have been the same on average, but not in each update."
    )


@pytest.mark.parametrize(
    ("kl", "end"),
    [
        (0.010099, "without the clip, the KL(π_old‖π) would have been the same."),
        (0.010101, "the KL(π_old‖π) would have been 1.01 times as large without the clip."),
        (0.009901, "without the clip, the KL(π_old‖π) would have been the same."),
        (0.009899, "the KL(π_old‖π) would have been 0.99 times as large without the clip."),
    ],
)
def test_a_kl_within_one_percent_is_the_same(run_of, kl: float, end: str) -> None:
    assert words(run_of(1, counterfactual={"clip": kl}, trust__kl=0.01))[LIMITED] == f"In 1 attributed update, {end}"


def test_the_other_updates_are_described_by_interventions(run_of) -> None:
    said = words(
        run_of(
            counterfactual=lambda p: {"clip": 0.02} if p in (0.5, 1) else None,
            binding=lambda p: "grad_norm" if p in (0.5, 1) else "anchor",
        )
    )
    assert said[LIMITED] == (
        "In 2 attributed updates, the KL(π_old‖π) of an update would have been 2 times as large without the clip (geometric "
        "means). Of the other updates, only interventions are on record, which need not have changed the outcome. The "
        "mechanism that intervened most was the anchor in 10 of 10 updates."
    )


@pytest.mark.parametrize("counterfactual", [None, {}, {"clip": None}])
def test_without_a_known_counterfactual_interventions_are_described(run_of, counterfactual) -> None:
    said = words(run_of(counterfactual=counterfactual, binding="value_clip"))
    assert said[LIMITED] == "The mechanism that intervened most was the clip of the value in 12 of 12 updates."
    unknown = words(run_of(counterfactual={"clip": 0.1}, trust__kl=None))
    assert unknown[LIMITED] == "The mechanism that intervened most was the clip in 12 of 12 updates."


@pytest.mark.parametrize(
    ("binding", "shares", "left_out"),
    [
        ("clip", {"clip": 0.2, "grad_norm": 0.3}, True),
        ("clip", {"clip": 0.2, "grad_norm": 0.2}, False),
        ("none", {"clip": 0.0, "grad_norm": 0.02}, True),
        ("none", {"clip": 0.0, "grad_norm": 0.01}, False),
        ("grad_norm", {"clip": 0.2, "grad_norm": 0.3}, False),
        ("unknown", {"grad_norm": 0.3}, False),
        ("clip", None, False),
    ],
)
def test_a_limit_on_the_norm_that_is_not_counted_is_mentioned(run_of, binding, shares, left_out) -> None:
    said = words(run_of(binding=binding, shares=shares))[LIMITED]
    assert ("the gradient's norm is not among them: the optimizer rescales gradients itself." in said) == left_out


def test_the_summary_of_the_anchor(run_of) -> None:
    said = words(run_of(anchor__kl_exact=lambda p: 9.0 if p > 0.6 else 1.0, anchor__coef=lambda p: p))["The anchor"]
    assert "averaged 9 nats per response over the last 4 updates, above its target of 6 (150 % of it)" in said
    assert "β went from 0.0833 to 1" in said
    none = words(run_of(anchor__coef=0.0, anchor__target=None))["The anchor"]
    assert none.startswith("None: β was 0 throughout")


def test_the_largest_update_and_what_it_would_have_been(run_of) -> None:
    plain = words(run_of(trust__kl=lambda p: 0.2 if p == 0.5 else 0.01, trust__kl_max=3.0))["The largest update"]
    assert plain.startswith("Update 6 moved the policy most: measured after it, KL(π_old‖π) was 0.2 nats per token")
    assert "Backtracking" not in plain
    limited = {"trust__limit": 0.02, "trust__guaranteed": 0.02, "trust__scale": lambda p: 0.5 if p > 0.7 else 1.0}
    enforced = words(run_of(**limited, trust__kl_proposed=lambda p: 0.3 * p))
    assert enforced["The largest update"].endswith(
        "Backtracking shortened 4 updates; without it the largest would have moved the policy by 0.3."
    )


def test_what_is_guaranteed_and_what_is_not(run_of) -> None:
    said = words(run_of())
    assert said["Guaranteed"].startswith("Nothing: no mechanism of this run enforces a bound.")
    assert "the size of an update" in said["Not guaranteed"]
    said = words(run_of(trust__guaranteed=0.02, trust__limit=0.02, trust__scale=1.0))
    assert said["Guaranteed"].startswith(
        "In every update, the mean KL(π_old‖π) over the tokens of the batch was at most 0.02"
    )
    assert "a single token" in said["Not guaranteed"] and "the size of an update" not in said["Not guaranteed"]
    said = words(run_of(trust__guaranteed=lambda p: 0.02 if p > 0.5 else None))
    assert said["Guaranteed"].startswith("In 6 of 12 updates")


@pytest.mark.parametrize("rule", ["sapo", "dppo_tv", "dppo_kl", "drpo", "troll", "gspo", "none"])
@pytest.mark.parametrize("end", [0.2, None])
def test_no_range_of_ratios_is_reported_for_a_rule_without_one(run_of, rule: str, end: float | None) -> None:
    run = run_of(trust__rule=rule, trust__low=end, trust__high=end, trust__max_ratio=99.0)
    assert FINDINGS["ratio_far_outside"](run) is None
    shown = " ".join([*words(run).values(), *(cell for row in settings(run).rows for cell in row)])
    assert "clip range" not in shown and "[0.8, 1.2]" not in shown and "nan" not in shown


def test_rejected_updates_are_reported(run_of) -> None:
    said = words(run_of(refused=lambda p: "not finite" if p == 1 else None, score=rising))
    assert "The mean score rose: 0.325 over the first third" in said["Outcome"]
    assert said["Outcome"].endswith("1 update was rejected; the parameters were left unchanged.")


def test_a_rejected_update_is_neither_bound_nor_shortened(run_of) -> None:
    """Records of earlier versions may name a mechanism for an update that was rolled back."""
    run = run_of(
        refused=lambda p: "too far" if p == 1 else None,
        binding=lambda p: "backtrack" if p == 1 else "clip",
        trust__scale=lambda p: 0.0 if p == 1 else 1.0,
        trust__kl_proposed=lambda p: 99.0 if p == 1 else 0.01,
    )
    said = words(run)
    assert said["What limited the updates"].endswith(
        "was the clip in 11 of 12 updates and none, because the update was rejected, in 1."
    )
    assert "shortened" not in said["The largest update"]
    assert all(values[-1] == 0 for values in shares(run.records).values())


def test_an_unknown_anchor_is_not_reported_as_off(tmp_path):
    run = trl_run(tmp_path, anchor__coef=None)
    assert "β was 0" not in words(run)["The anchor"]
    assert json.loads((tmp_path / "run" / "bounds.jsonl").read_text().splitlines()[0])["anchor"]["coef"] is None


def certificate(gain: float, bound: float, needed: float | None) -> dict[str, Any]:
    values = {"gain": gain, "stderr": 0.01, "bound": bound, "difference": gain - bound, "smallest": "adaptive"}
    return values | {"kl_needed": needed}


def test_how_many_updates_are_certified(run_of) -> None:
    """Of 12 updates: 3 are, 6 would be with a smaller limit, 2 with none, and 1 has no certificate."""
    found = [certificate(0.2, 0.1, 0.3)] * 3 + [certificate(0.1, 0.5, 0.01 * i) for i in range(1, 7)]
    found += [certificate(-0.1, 0.5, None), certificate(0.0, 0.5, None), None]
    text = words(run_of(trust__certificate=lambda p: found[round(12 * p) - 1], trust__kl_max=lambda p: p))["Certified"]
    assert text == (
        "On their own batch, 3 of 11 updates with a certificate on record are certified: the surrogate's gain is above the "
        "bound on its error by two standard errors. For 6 others, the largest KL of one token would have had to be at most "
        "0.035 nats (median) instead of 0.542. In 2, the gain was not above 0 by that much, so that no limit would have "
        "helped. This is a statement about each batch, not a proof."
    )


def test_every_update_is_certified(run_of) -> None:
    text = words(run_of(trust__certificate=certificate(0.2, 0.1, 0.3)))["Certified"]
    assert text == (
        "On their own batch, 12 of 12 updates are certified: the surrogate's gain is above the bound on its error by two "
        "standard errors. This is a statement about each batch, not a proof."
    )


@pytest.mark.parametrize("missing", [None, certificate(math.nan, math.nan, math.nan)])
def test_a_certificate_that_is_not_on_record(run_of, missing) -> None:
    topics = words(run_of(trust__certificate=missing))
    assert ("Certified" in topics) == (missing is not None)
    if missing is not None:
        assert topics["Certified"].startswith("On their own batch, 0 of 12 updates are certified: ")
