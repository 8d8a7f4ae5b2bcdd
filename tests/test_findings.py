"""Every finding, on a record that shows it and on a near one that does not; and the answer in words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_trustkl.report import read_run
from trl_trustkl.report.findings import FINDINGS, find
from trl_trustkl.report.schema import Run
from trl_trustkl.report.series import shares
from trl_trustkl.report.summary import summarise
from trl_trustkl.report.tables import settings

Row = dict[str, Any]
QUANTILES = {"0.01": 0.7, "0.05": 0.8, "0.25": 0.95, "0.5": 1.0, "0.75": 1.05, "0.95": 1.2, "0.99": 1.4}
HEALTHY: Row = {
    "update": 1, "episode": 16, "score": 0.4, "length": 20.0, "eos_rate": 0.9, "entropy": 2.5, "lr": 1e-3,
    "refused": None, "seconds": {"generate": 3.0, "score": 2.0, "optimise": 5.0, "measure": 1.0, "total": 11.0},
    "anchor": {
        "estimator": "k1", "placement": "reward", "gradient": "exact", "coef": 0.05, "target": 6.0, "kl": 5.8,
        "kl_exact": 6.0, "kl_stderr": 0.3, "share": 0.2,
    },
    "trust": {
        "rule": "ppo", "low": 0.2, "high": 0.2, "gated": 0.1, "gated_low": 0.04, "gated_high": 0.06, "coef": 0.0,
        "epochs": 2.0, "stopped": False, "kl": 0.01, "kl_max": 0.3, "kl_proposed": 0.01, "tv": 0.05, "max_ratio": 2.0,
        "ratio_quantiles": QUANTILES, "scale": None, "tries": 0, "limit": None, "guaranteed": None,
    },
    "value": {"clip": 0.2, "gated": 0.05, "explained_variance": 0.4},
    "gradient": {"norm": 0.5, "max_norm": 1.0, "scale": 1.0},
    "sampler": {"kl": 0.0005},
    "binding": "clip",
}  # fmt: skip


def rows_of(count: int = 12, **changes: Any) -> list[Row]:
    """Healthy rows with changes, such as trust__kl=0.1 or lr=lambda p: 1e-3 * p, p going from 1/count to 1."""
    rows = []
    for number in range(1, count + 1):
        row = copy.deepcopy(HEALTHY) | {"update": number, "episode": 16 * number}
        for key, value in changes.items():
            place, (*path, last) = row, key.split("__")
            for step in path:
                place = place[step]
            place[last] = value(number / count) if callable(value) else value
        rows.append(row)
    return rows


def completions_of(rows: list[Row], ref_logp: Callable[[float], float] = lambda p: -50.0) -> list[Row]:
    return [
        {"update": row["update"], "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": ref_logp(i / len(rows))}
        for i, row in enumerate(rows, start=1)
        for _ in range(2)
    ]


def write_run(folder: Path, rows: list[Row], completions: list[Row] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("bounds.jsonl", rows), ("completions.jsonl", completions)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Run]:
    def make(count: int = 12, ref_logp: Callable[[float], float] = lambda p: -50.0, **changes: Any) -> Run:
        rows = rows_of(count, **changes)
        return read_run(write_run(tmp_path / "run", rows, completions_of(rows, ref_logp)))

    return make


def rising(p: float) -> float:
    return 0.2 + 0.6 * p


Changes = dict[str, Any]
CASES: list[tuple[str, Changes, Changes, str, str]] = [
    # finding, a record that shows it, a near one that does not, words of the evidence, words of the advice
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
     "came no nearer than 3", "total_episodes=384"),
    ("target_never_reached",
     {"anchor__kl_exact": lambda p: min(6 * p, 3)},
     {"anchor__kl_exact": lambda p: min(6 * p, 5)},
     "came no nearer than 3", "kl_coef=0.025"),
    ("target_never_reached",
     {"anchor__kl_exact": lambda p: 30 * p},
     {"anchor__kl_exact": lambda p: 30 * p, "anchor__target": None},
     "stayed above 22.5", "kl_coef=0.1"),
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
     "1 % quantiles 0.1", "the limit in force"),
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
     "adds noise and no pull", 'kl_placement="reward"'),
    ("updates_refused",
     {"refused": lambda p: "the policy's gradient is not finite" if p > 0.8 else None, "gradient__norm": None},
     {"gradient__norm": None},
     "3 updates of 12 left", "learning_rate=0.0005"),
]  # fmt: skip


def test_a_healthy_run_has_no_finding(run_of) -> None:
    assert find(run_of()) == []


def test_every_finding_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(FINDINGS)


@pytest.mark.parametrize(("name", "shows", "near", "evidence", "advice"), CASES, ids=lambda case: str(case)[:24])
def test_findings(run_of, name: str, shows: Changes, near: Changes, evidence: str, advice: str) -> None:
    finding = FINDINGS[name](run_of(**shows))
    assert finding is not None and finding.name == name
    assert evidence in finding.evidence
    assert advice in finding.advice and "=" in finding.advice, finding.advice
    assert "nan" not in " ".join(finding).lower()
    assert FINDINGS[name](run_of(**near)) is None


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
def test_a_short_run_or_one_without_numbers_is_no_crash(run_of, name: str, count: int) -> None:
    nothing = {
        "score": None,
        "anchor__share": None,
        "anchor__kl_exact": None,
        "trust__kl": None,
        "trust__max_ratio": None,
    }
    assert FINDINGS[name](run_of(count, **nothing, gradient__norm=None, trust__ratio_quantiles={})) is None


# -- the answer in words -----------------------------------------------------------------------------------------------


def words(run: Run) -> dict[str, str]:
    return dict(summarise(run))


def test_which_mechanism_bound_how_many(run_of) -> None:
    said = words(run_of(binding=lambda p: "clip" if p > 0.3 else "none"))
    assert said["What bound the updates"] == (
        "Of 12 updates, the mechanism that took the largest share was the clip in 9 and nothing (no mechanism took 1 %) in 3."
    )


def test_where_the_anchor_stood(run_of) -> None:
    said = words(run_of(anchor__kl_exact=lambda p: 9.0 if p > 0.6 else 1.0, anchor__coef=lambda p: p))["The anchor"]
    assert "averaged 9 nats per response over the last 4 updates; the target is 6 (above it: 150 % of it)" in said
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


@pytest.mark.parametrize("rule", ["sapo", "dppo_tv", "dppo_kl", "gspo", "none"])
@pytest.mark.parametrize("end", [0.2, None])
def test_no_range_of_ratios_is_told_of_a_rule_without_one(run_of, rule: str, end: float | None) -> None:
    run = run_of(trust__rule=rule, trust__low=end, trust__high=end, trust__max_ratio=99.0)
    assert FINDINGS["ratio_far_outside"](run) is None
    told = " ".join([*words(run).values(), *(cell for row in settings(run).rows for cell in row)])
    assert "clip range" not in told and "[0.8, 1.2]" not in told and "nan" not in told


def test_refused_updates_are_told(run_of) -> None:
    said = words(run_of(refused=lambda p: "not finite" if p == 1 else None, score=rising))
    assert "The mean score rose: 0.325 over the first third" in said["Outcome"]
    assert said["Outcome"].endswith("1 update was refused: the parameters stayed as they were.")


def test_shares_are_those_on_record_and_derived_where_there_are_none(run_of) -> None:
    said = {"anchor": 0.1, "clip": 0.05, "penalty": 0.4, "stop": 0.3, "backtrack": 0.2, "grad_norm": 0.15, "lr": 0.25}
    changes = {"trust__stopped": True, "trust__epochs": 1.0, "gradient__scale": 0.5}
    recorded = shares(run_of(shares=lambda p: said if p > 0.5 else None, **changes).records)
    assert {name: values[-1] for name, values in recorded.items()} == said
    assert {name: values[0] for name, values in recorded.items()} == {
        "anchor": 0.2, "clip": 0.1, "penalty": 0.0, "stop": 0.0, "backtrack": 0.0, "grad_norm": 0.5, "lr": 0.0,
    }  # fmt: skip


def test_a_refused_update_is_neither_bound_nor_shortened(run_of) -> None:
    """Whatever its record says: one of an earlier version may name what took a share of what was undone."""
    run = run_of(
        refused=lambda p: "too far" if p == 1 else None,
        binding=lambda p: "backtrack" if p == 1 else "clip",
        trust__scale=lambda p: 0.0 if p == 1 else 1.0,
        trust__kl_proposed=lambda p: 99.0 if p == 1 else 0.01,
    )
    said = words(run)
    assert said["What bound the updates"].endswith("was the clip in 11 and none, as the update was refused, in 1.")
    assert "shortened" not in said["The largest update"]
    assert all(values[-1] == 0 for values in shares(run.records).values())
