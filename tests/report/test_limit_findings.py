"""Each finding about hard limits, on records that show it and on similar ones that do not."""

from __future__ import annotations

from typing import Any

from tests.example_runs import trl_run
from tests.report.cases import Case, Changes, checks_of, own
from trl_trustkl.report import limit_findings
from trl_trustkl.report.findings import FINDINGS
from trl_trustkl.report.summary import anchor, guaranteed, largest_update, not_guaranteed
from trl_trustkl.report.tables import settings, updates


def shortened(where: float, decided: str | None, scale: float = 0.25, **changes: Any) -> Changes:
    """Updates that a limit shortened in the part of the run after `where`."""
    return {
        "trust__scale": lambda p: scale if p > where else 1.0, "trust__tries": 3,
        "trust__decided": lambda p: decided if p > where else None, **changes,
    }  # fmt: skip


MEAN, TOKEN, ANCHOR = {"trust__limit": 0.02}, {"trust__limit_token": 0.5}, {"anchor__limit": 8.0}
FREE = {"anchor__target": None, "anchor__coef": 0.0}

CASES: list[Case] = [
    # finding, records that show it, similar records that do not, part of the evidence, part of the advice
    ("limit_decides", shortened(0.4, None, **MEAN), shortened(0.6, None, **MEAN),
     "shortened 8 of 12 updates, and kept 25 % of the step in the median", "trust_lr_target=0.01"),
    ("limit_decides", shortened(0.4, "trust_max_kl", **MEAN), shortened(0.6, "trust_max_kl", **MEAN),
     "took 3 further measurements on average.", "trust_lr_target=0.01, half of the limit"),
    ("limit_decides", shortened(0.4, "trust_max_kl_token", trust__kl=0.003, **TOKEN),
     shortened(0.6, "trust_max_kl_token", **TOKEN),
     "the limit that decided was: trust_max_kl_token (0.5 nats at one token) 8.", "trust_lr_target=0.003, the median KL of"),
    ("limit_decides",
     {**shortened(0.4, None, **MEAN, **TOKEN),
      "trust__decided": lambda p: "trust_max_kl_token" if p > 0.9 else "trust_max_kl" if p > 0.4 else None},
     shortened(0.4, "anchor_max_kl", **ANCHOR),
     "trust_max_kl (0.02 nats per token) 6, trust_max_kl_token (0.5 nats at one token) 2.", "trust_lr_target=0.01"),
    ("anchor_blocks", shortened(0.7, "anchor_max_kl", 0.0, **ANCHOR, **FREE), shortened(0.7, "anchor_max_kl", 0.1, **ANCHOR),
     "4 of 12 updates changed nothing: the KL to the reference was at its limit of 8 nats per response, and every part of "
     "their step would have increased it. No penalty with a target lowers the KL.", 'kl_controller="dual" and kl_target=4'),
    ("anchor_blocks", shortened(0.7, "anchor_max_kl", 0.0, **ANCHOR), shortened(0.9, "anchor_max_kl", 0.0, **ANCHOR),
     "The penalty is too weak to prevent this.", "kl_target=4, in nats per response"),
    ("anchor_blocks", shortened(0.7, "anchor_max_kl", 0.0, **ANCHOR), shortened(0.7, "trust_max_kl", 0.0, **ANCHOR),
     "4 of 12", "kl_target=4"),
]  # fmt: skip


test_every_finding_has_a_case, test_findings = checks_of(own(limit_findings), CASES)


def test_with_grpo_the_target_is_per_token(tmp_path) -> None:
    changes = shortened(0.7, "anchor_max_kl", 0.0, **ANCHOR) | {"trainer": "GRPOTrainer"}
    finding = FINDINGS["anchor_blocks"](trl_run(tmp_path, **changes))
    assert finding is not None
    assert "kl_target=0.2, in nats per token, about half of the limit" in finding.advice  # of 20 tokens
    assert "AdaptiveKLCallback" in finding.advice


def test_a_rejected_update_was_not_blocked(run_of) -> None:
    changes = shortened(0.7, "anchor_max_kl", 0.0, **ANCHOR) | {"refused": lambda p: "why" if p > 0.7 else None}
    assert FINDINGS["anchor_blocks"](run_of(**changes)) is None


# -- what the summary and the tables say of limits ---------------------------------------------------------------------

EVERY: Changes = {
    "trust__limit": 0.02, "trust__guaranteed": 0.02, "trust__limit_token": 0.5, "trust__guaranteed_token": 0.5,
    "trust__limit_response": 0.9, "trust__guaranteed_response": 0.9, "anchor__limit": 8.0,
    "anchor__guaranteed": lambda p: 8.5 if p == 1 else 8.0, "trust__scale": 1.0,
}  # fmt: skip


def test_each_bound_that_was_enforced_is_stated(run_of) -> None:
    text = guaranteed(run_of(**EVERY))
    for part in (
        "In every update, the mean KL(π_old‖π) over the tokens of the batch was at most 0.02 nats per token, ",
        "each of its tokens was at most 0.5 nats",
        "over each of its responses was at most 0.9 nats",
        "the mean KL(π‖π_ref) of its responses was at most 8.5 nats: backtracking enforced these bounds",
        "1 update was made from above the limit of 8 nats per response on the KL to the reference, and did not increase it.",
    ):
        assert part in text
    said = not_guaranteed(run_of(**EVERY))
    assert "single token" not in said and "the KL to the reference" not in said and "size of an update" not in said
    assert "prompts that were not in the batch" in said


def test_a_bound_of_some_updates_is_stated_beside_one_of_all(run_of) -> None:
    some = EVERY | {"anchor__guaranteed": lambda p: 8.0 if p > 0.5 else None}
    text = guaranteed(run_of(**some))
    assert "; in 6 of 12 updates, the mean KL(π‖π_ref) of its responses was at most 8 nats: backtracking" in text


def test_a_limit_of_the_anchor_alone_does_not_bound_an_update(run_of) -> None:
    only = {"anchor__limit": 8.0, "anchor__guaranteed": 8.0, "trust__scale": 1.0}
    assert guaranteed(run_of(**only)).endswith("backtracking enforced this bound, on the contexts of the batch.")
    said = not_guaranteed(run_of(**only))
    assert "the size of an update" in said and "the KL to the reference" not in said
    assert "A hard limit of 8 nats per response was enforced on each batch." in anchor(run_of(**only))
    free = anchor(run_of(**only, anchor__coef=0.0, anchor__target=None))
    assert (
        free.endswith(" A hard limit of 8 nats per response was enforced on each batch.")
        and "nothing limited" not in free
    )


def test_the_limits_that_decided_are_counted(run_of) -> None:
    changes = EVERY | shortened(0.7, "anchor_max_kl", 0.0)
    changes["trust__decided"] = lambda p: "anchor_max_kl" if p > 0.7 else "trust_max_kl_token" if p > 0.6 else None
    text = largest_update(run_of(**changes))
    assert "The limit that decided was anchor_max_kl in 4 updates and trust_max_kl_token in 1 update" in text
    assert "; 4 updates changed nothing" in text
    assert "decided" not in largest_update(run_of(**MEAN, **shortened(0.5, "trust_max_kl")))


def test_the_tables_name_the_limits_that_are_on(run_of) -> None:
    found = {row[1]: row[2] for row in settings(run_of(**EVERY)).rows}
    assert found["trust_max_kl_token"] == "0.5 nats" and found["trust_max_kl_response"] == "0.9 nats per response"
    assert found["anchor_max_kl"] == "8 nats per response"
    assert "anchor_max_kl" not in {row[1] for row in settings(run_of()).rows}
    table = updates(run_of(**EVERY, **{"binding": "backtrack", "trust__decided": "anchor_max_kl"}))
    assert table.rows[0][table.head.index("bound by")] == "backtrack (anchor_max_kl)"
