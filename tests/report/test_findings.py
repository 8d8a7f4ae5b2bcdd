"""Each finding, on records that show it and on similar records that do not."""

from __future__ import annotations

import pytest

from tests.example_runs import QUANTILES, rising, trl_run
from tests.report.cases import Case, Changes, assert_found, each_of
from trl_trustkl.report.findings import FINDINGS, find
from trl_trustkl.report.summary import summarise

CASES: list[Case] = [
    # finding, records that show it, similar records that do not, part of the evidence, part of the advice
    ("clip_never_binds",
     {"trust__gated": 0.0, "trust__epochs": 1.0},
     {"trust__gated": 0.0, "trust__epochs": 1.0, "trust__rule": "none"},
     "12 updates, each of them a single pass", "num_ppo_epochs=2"),
    ("clip_never_binds",
     {"trust__gated": 0.0, "trust__max_ratio": 1.01},
     {"trust__gated": lambda p: 0.01 if p == 1 else 0.0},
     "largest ratio measured after a step was 1.01", "learning_rate=0.002"),
    ("coefficient_pinned",
     {"anchor__kl_exact": 20.0, "anchor__coef": lambda p: min(0.1 + p, 0.5)},
     {"anchor__kl_exact": 20.0, "anchor__coef": lambda p: 0.1 + p},
     "β was 0.5 in each of the last 4 updates", '"max_coef": 5}'),
    ("coefficient_pinned",
     {"anchor__kl_exact": 2.0},
     {"anchor__kl_exact": lambda p: 3.5 * p},
     "held at its floor, or fixed", '"min_coef": 0.005}'),
    ("target_never_reached",
     {"anchor__kl_exact": lambda p: 3 * p},
     {"anchor__kl_exact": lambda p: 5.9 * p},
     "reached at most 3", "total_episodes=384"),
    ("target_never_reached",
     {"anchor__kl_exact": lambda p: min(6 * p, 3)},
     {"anchor__kl_exact": lambda p: min(6 * p, 5)},
     "reached at most 3", "kl_coef=0.025"),
    ("target_never_reached",
     {"anchor__kl_exact": lambda p: 30 * p},
     {"anchor__kl_exact": lambda p: 30 * p, "anchor__target": None},
     "was at least 22.5", "kl_coef=0.1"),
    ("negative_estimate",
     {"anchor__kl": lambda p: -1.5 if p > 0.7 else 3.0, "sampler__kl": 0.08},
     {"anchor__kl": lambda p: -1.5 if p == 1 else 3.0, "sampler__kl": 0.08},
     "0.08 nats per token on average", "generation_kwargs=None"),
    ("negative_estimate",
     {"anchor__kl": lambda p: -1.5 if p > 0.7 else 3.0},
     {"anchor__kl": 0.0},
     "few samples", 'kl_estimator="exact"'),
    ("negative_estimate",
     {"anchor__kl": -0.1, "sampler__kl": None},
     {"anchor__kl": 0.1, "sampler__kl": None},
     "not on record", 'kl_placement="both"'),
    ("ratio_far_outside",
     {"trust__max_ratio": lambda p: 275.0 if p == 1 else 2.0, "trust__kl": 0.08},
     {"trust__max_ratio": 275.0, "trust__rule": "none"},
     "In 1 of 12 updates", "trust_max_kl=0.04"),
    ("ratio_far_outside",
     {"trust__ratio_quantiles": QUANTILES | {"0.01": 0.1}, "trust__limit": 0.02},
     {"trust__ratio_quantiles": QUANTILES | {"0.01": 0.5}},
     "1 % quantile was 0.1", "the limit in force"),
    ("anchor_outweighs",
     {"anchor__share": lambda p: 0.3 + 0.6 * p, "anchor__coef": 0.4},
     {"anchor__share": lambda p: 0.1 + 0.6 * p, "anchor__coef": 0.4},
     "in 8 of 12 updates", "kl_target=9"),
    ("anchor_outweighs",
     {"anchor__share": 0.6, "anchor__coef": 0.4, "anchor__target": None},
     {"anchor__share": None, "anchor__coef": 0.4, "anchor__target": None},
     "in 12 of 12 updates, 60 % on average", "kl_coef=0.2"),
    ("early_stop",
     {"trust__stopped": lambda p: p > 0.4, "trust__epochs": lambda p: 0.5 if p > 0.4 else 2.0},
     {"trust__stopped": lambda p: p > 0.6, "trust__epochs": lambda p: 0.5 if p > 0.6 else 2.0},
     "8 of 12 updates ended at trust_stop, after 0.5 epochs on average; at least 75 %", "learning_rate=0.0005"),
    ("learning_rate_floor",
     {"lr": lambda p: 1e-3 / 32 if p > 0.5 else 1e-3},
     {"lr": lambda p: 1e-3 / 16 if p > 0.5 else 1e-3},
     "In 6 of 12 updates", "learning_rate=0.00013"),
    ("reward_hacking",
     {"score": rising, "ref_logp": lambda p: -40 - 60 * p},
     {"score": 0.4, "ref_logp": lambda p: -40 - 60 * p},
     "nats per token", "kl_target=2"),
    ("reward_hacking",
     {"score": rising, "ref_logp": lambda p: -40 - 60 * p, "anchor__target": None},
     {"score": rising, "ref_logp": lambda p: -50 + 10 * p},
     "the score rose by 0.4", 'kl_controller="adaptive"'),
    ("value_explains_nothing",
     {"value__explained_variance": lambda p: -0.2},
     {"value__explained_variance": lambda p: -0.2 if p < 0.6 else 0.3},
     "explained -0.2", "value_learning_rate=0.005"),
    ("biased_estimator",
     {"anchor__estimator": "k3", "anchor__gradient": "biased"},
     {"anchor__estimator": "k3", "anchor__gradient": "biased", "anchor__coef": 0.0, "anchor__target": None},
     "k3 with the placement reward", 'kl_estimator="k1"'),
    ("biased_estimator",
     {"anchor__placement": "loss", "anchor__gradient": "zero"},
     {"anchor__placement": "both"},
     "adds only noise", 'kl_placement="reward"'),
    ("updates_refused",
     {"refused": lambda p: "the policy's gradient is not finite" if p > 0.8 else None, "gradient__norm": None},
     {"gradient__norm": None},
     "3 of 12 updates were rejected", "learning_rate=0.0005"),
]  # fmt: skip


def test_a_healthy_run_has_no_finding(run_of) -> None:
    assert find(run_of()) == []


def test_every_finding_has_a_case() -> None:
    own = {name for name, of_run in FINDINGS.items() if of_run.__module__ == find.__module__}
    assert {case[0] for case in CASES} == own


@each_of(CASES)
def test_findings(run_of, name: str, shows: Changes, near: Changes, evidence: str, advice: str) -> None:
    assert_found(run_of, name, shows, near, evidence, advice)


@pytest.mark.parametrize(
    ("name", "shows", "advice"),
    [
        (
            "clip_never_binds",
            {"trust__gated": 0.0},
            "learning_rate=0.002, twice the present one, which is at most 0.001.",
        ),
        (
            "early_stop",
            {"trust__stopped": True},
            "learning_rate=0.0005, half of the present one, which is at most 0.001",
        ),
        (
            "updates_refused",
            {"refused": "why"},
            "learning_rate=0.0005, half of the present one, which is at most 0.001",
        ),
        ("value_explains_nothing", {"value__explained_variance": 0.0}, "value_learning_rate=0.005, five times"),
    ],
)
def test_the_present_learning_rate_is_what_a_decaying_schedule_began_with(run_of, name, shows, advice) -> None:
    decaying = run_of(lr=lambda p: 1e-3 * (1 - p + 1 / 12), **shows)
    assert advice in FINDINGS[name](decaying).advice


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("name", FINDINGS)
def test_a_short_run_or_one_without_numbers_does_not_crash(run_of, name: str, count: int) -> None:
    nothing = {
        "score": None,
        "anchor__share": None,
        "anchor__kl_exact": None,
        "trust__kl": None,
        "trust__max_ratio": None,
    }
    assert FINDINGS[name](run_of(count, **nothing, gradient__norm=None, trust__ratio_quantiles={})) is None


# -- records of TRL's trainers -------------------------------------------------------------------------------------------


def test_unknown_values_cause_no_finding(tmp_path):
    unknown = {"trust__gated": None, "anchor__kl": None, "anchor__coef": 0.0, "gradient__scale": None, "entropy": None}
    run = trl_run(tmp_path, **unknown, lr=lambda p: 1e-3 if p < 0.5 else 1e-6)
    assert find(run) == []
    words = dict(summarise(run))
    assert words["What limited the updates"] == (
        "The mechanism that intervened most was not on record in 12 of 12 updates."
    )
    assert words["The anchor"] == "The KL to the reference is not on record; β was 0 throughout."
    assert "nothing" not in words["What limited the updates"] and "–" not in " ".join(words.values())


def test_clip_never_binds_is_not_found_if_one_update_lacks_a_clip_ratio(tmp_path):
    idle = {"trust__gated": lambda p: None if p == 1 else 0.0, "anchor__gradient": "exact"}
    assert "clip_never_binds" not in {finding.name for finding in find(trl_run(tmp_path, **idle))}


@pytest.mark.parametrize(
    ("name", "changes", "advice"),
    [
        ("clip_never_binds", {"trust__gated": 0.0}, "num_iterations=2"),
        ("target_never_reached", {"anchor__kl": lambda p: 3 * p}, "max_steps=24"),
        ("target_never_reached", {"anchor__kl": 20.0}, "the controller's coef=0.1"),
        ("coefficient_pinned", {"anchor__kl": 20.0}, "Give the controller max_coef=0.5"),
        ("negative_estimate", {"anchor__kl": -1.0}, "gradient_accumulation_steps"),
        ("biased_estimator", {}, "RLOOTrainer"),
        ("biased_estimator", {"anchor__gradient": "biased"}, "use_bias_correction_kl=True"),
        ("biased_estimator", {"anchor__gradient": "biased", "anchor__placement": "reward"}, 'kl_estimator="k1"'),
    ],
)
def test_findings_in_terms_of_the_trainer(name, changes, advice, tmp_path):
    found = {finding.name: finding for finding in find(trl_run(tmp_path, **changes))}
    assert advice in found[name].advice
    for finding in found.values():
        assert "–" not in finding.evidence, "the sentence has a number that is missing"
        assert not any(option in finding.advice for option in ("trust_", "kl_coef", "kl_controller", "kl_placement"))
