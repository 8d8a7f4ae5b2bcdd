"""The limits per token, per response and of the KL to the reference over many updates, confirmed by a computation that shares
nothing with the trainer's (tests/witness.py)."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import pytest

from tests import tiny
from tests.families import FOUR as FAMILIES
from tests.witness import TOO_FAST, Dense, Witnessed, pretending, witnessed
from trl_trustkl import load_records
from trl_trustkl.records import BoundRecord

pytestmark = pytest.mark.filterwarnings("ignore")
ROUNDING = 5e-5
"""Nats by which a dense KL may differ from that in float32, of a token or of a response of a few tokens."""


class Limit(NamedTuple):
    """A limit, and what the witness and the record say about it."""

    field: str
    value: float

    def dense(self, dense: Dense) -> float:
        names = {"trust_max_kl_token": "token", "trust_max_kl_response": "response", "anchor_max_kl": "anchor"}
        return getattr(dense, names[self.field])

    def recorded(self, record: BoundRecord) -> tuple[float | None, float | None, float | None]:
        """The limit, what was measured, and what is guaranteed."""
        trust, anchor = record.trust, record.anchor
        return {
            "trust_max_kl_token": (trust.limit_token, trust.kl_max, trust.guaranteed_token),
            "trust_max_kl_response": (trust.limit_response, trust.kl_response_max, trust.guaranteed_response),
            "anchor_max_kl": (anchor.limit, anchor.kl_after, anchor.guaranteed),
        }[self.field]

    def allowed(self, dense: Dense) -> float:
        """An update from above the limit of the anchor must not increase the KL."""
        return max(self.value, dense.anchor_before) if self.field == "anchor_max_kl" else self.value


LIMITS = [Limit("trust_max_kl_token", 0.05), Limit("trust_max_kl_response", 0.1), Limit("anchor_max_kl", 0.5)]
EACH = pytest.mark.parametrize("limit", LIMITS, ids=[limit.field for limit in LIMITS])


def run_of(folder: Any, limit: Limit | None, family: str, *, full: bool, updates: int) -> Witnessed:
    changes = TOO_FAST | {"max_steps": updates} | ({} if limit is None else {limit.field: limit.value})
    if full:
        changes |= {"learning_rate": 5e-2 if family == "gemma2" else 1e-2}
    arguments = {"peft_config": None} if full else {}
    trainer = witnessed(folder, FAMILIES[family](), changes=changes, **arguments)
    trainer.train()
    assert len(trainer.dense) == updates
    return trainer


def assert_held(trainer: Witnessed, limit: Limit) -> None:
    """After every update the limit holds by the witness and by the record, and the two agree."""
    for number, (update, dense) in enumerate(zip(trainer.updates, trainer.dense, strict=True), start=1):
        record, found, allowed = update.record, limit.dense(dense), limit.allowed(dense)
        configured, measured, guaranteed = limit.recorded(record)
        assert found <= allowed + ROUNDING, number
        assert configured == limit.value and measured <= guaranteed == pytest.approx(allowed, abs=ROUNDING), number
        assert measured == pytest.approx(found, abs=ROUNDING, rel=1e-4), number
        assert record.refused is None and record.trust.limit is record.trust.guaranteed is None, number


def assert_used(trainer: Witnessed, limit: Limit) -> None:
    """The limit was needed in most updates, and was the one that decided; most shortened updates are not much below it."""
    shortened = [
        (update.record, limit.dense(dense))
        for update, dense in zip(trainer.updates, trainer.dense, strict=True)
        if update.record.trust.scale < 1
    ]
    assert len(shortened) > 0.5 * len(trainer.updates)
    assert {record.trust.decided for record, _ in shortened} == {limit.field}
    assert sum(found > 0.3 * limit.value for _, found in shortened) > 0.5 * len(shortened)


@EACH
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_each_limit_holds_after_every_update(limit, full, tmp_path):
    trainer = run_of(tmp_path, limit, "llama", full=full, updates=12)
    assert_held(trainer, limit)
    assert_used(trainer, limit)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_limit_holds_after_each_of_100_updates(limit, full, family, tmp_path):
    trainer = run_of(tmp_path, limit, family, full=full, updates=100)
    assert_held(trainer, limit)
    assert_used(trainer, limit)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_limit_each_is_exceeded(family, full, tmp_path):
    free = run_of(tmp_path, None, family, full=full, updates=4)
    for limit in LIMITS:
        assert max(limit.dense(dense) for dense in free.dense) > limit.value, limit.field
        assert set(limit.recorded(free.updates[0].record)[::2]) == {None}
    assert free.updates[0].record.trust.decided is None and free.updates[0].record.anchor.kl_after is None


def test_the_witness_would_see_a_limit_that_is_not_held(tmp_path):
    limit = LIMITS[0]
    trainer = witnessed(tmp_path, changes=TOO_FAST | {"max_steps": 2, limit.field: limit.value})
    pretending(trainer).train()
    with pytest.raises(AssertionError):
        assert_held(trainer, limit)


def test_all_limits_hold_together(tmp_path):
    changes = TOO_FAST | {limit.field: limit.value for limit in LIMITS} | {"trust_max_kl": 0.01, "max_steps": 20}
    trainer = witnessed(tmp_path, changes=changes)
    trainer.train()
    for dense in trainer.dense:
        assert all(limit.dense(dense) <= limit.allowed(dense) + ROUNDING for limit in LIMITS)
    assert all(dense <= 0.01 + ROUNDING for _, dense, _ in trainer.updates)
    decided = statistics.multimode(record.trust.decided for record, _, _ in trainer.updates)
    assert set(decided) <= {*(limit.field for limit in LIMITS), "trust_max_kl"}


def test_at_the_limit_an_update_that_would_increase_the_kl_changes_nothing(tmp_path):
    """A reward that pays for leaving the reference, without a penalty: the KL rises to the limit, and training stops there."""
    trainer = run_of(tmp_path, Limit("anchor_max_kl", 0.05), "llama", full=False, updates=12)
    blocked = [record for record, _, _ in trainer.updates if record.trust.scale == 0]
    assert blocked, "no update was blocked"
    for record in blocked:
        assert record.refused is None and record.trust.decided == "anchor_max_kl" and record.trust.kl == 0
        assert record.anchor.kl_after == record.anchor.kl_exact == record.anchor.guaranteed, (
            "the KL to the reference is not measured as before the first step"
        )
        assert record.shares["backtrack"] == 1 and record.binding == "backtrack"


def test_a_penalty_lets_training_go_on_at_the_limit(tmp_path):
    """With a controller whose target is below the limit, updates decrease the KL again."""
    limit = Limit("anchor_max_kl", 0.5)
    changes = TOO_FAST | {"max_steps": 30, limit.field: limit.value, "learning_rate": 2e-2}
    changes |= {"kl_controller": "dual", "kl_coef": 0.05, "kl_target": 0.2, "kl_controller_kwargs": {"lr": 0.3}}
    trainer = witnessed(tmp_path, changes=changes)
    trainer.train()
    assert_held(trainer, limit)
    late = [record for record, _, _ in trainer.updates][15:]
    assert any(record.anchor.kl_after < record.anchor.kl_exact for record in late)
    assert sum(record.trust.scale == 0 for record in late) < len(late) / 2


def test_a_rejected_update_is_within_the_limit_of_the_anchor(tmp_path):
    changes = TOO_FAST | {"max_steps": 2, "anchor_max_kl": 0.5, "panic_kl": 1e-9}
    tiny.trainer(tmp_path, changes=changes).train()
    for row in load_records(tmp_path):
        assert "panic_kl" in row["refused"] and row["trust"]["scale"] == 0 and row["trust"]["decided"] is None
        assert row["anchor"]["kl_after"] == row["anchor"]["kl_exact"] <= row["anchor"]["guaranteed"] == 0.5
