"""The limits of `TrustRegionCallback` per token, per completion and of the KL to the reference, on TRL's GRPO and RLOO
trainers, against a witness in float64 (see dense_windows.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.end_to_end.dense_windows import LabelledRLOO, Run, SetUp, Window, run
from tests.families import FOUR as FAMILIES
from trl_trustkl import AdaptiveKLCallback, TrustRegionCallback
from trl_trustkl.controllers import DualKL

pytestmark = pytest.mark.filterwarnings("ignore")
ROUNDING = 5e-5
"""Nats by which a KL in float32 may differ from that of the witness, of a token or of a completion of six."""


class Limit(NamedTuple):
    """A limit of the callback; the field by which the record names it; and what the witness and the record say about it."""

    option: str
    field: str
    value: float
    dense: Callable[[Window], float]
    recorded: Callable[[dict[str, Any]], tuple[float, float, float]]

    def allowed(self, window: Window) -> float:
        """A window that begins above the limit of the anchor must not increase the KL."""
        return max(self.value, window.anchor[0]) if self.option == "anchor_max_kl" else self.value


TOKEN = Limit(
    "max_kl_token", "trust_max_kl_token", 0.05, lambda window: window.token,
    lambda row: (row["trust"]["limit_token"], row["trust"]["kl_max"], row["trust"]["guaranteed_token"]),
)  # fmt: skip
RESPONSE = Limit(
    "max_kl_response", "trust_max_kl_response", 0.1, lambda window: window.response,
    lambda row: (row["trust"]["limit_response"], row["trust"]["kl_response_max"], row["trust"]["guaranteed_response"]),
)  # fmt: skip
ANCHOR = Limit(
    "anchor_max_kl", "anchor_max_kl", 0.05, lambda window: window.anchor_after,
    lambda row: (row["anchor"]["limit"], row["anchor"]["kl_after"], row["anchor"]["guaranteed"]),
)  # fmt: skip
LIMITS = (TOKEN, RESPONSE, ANCHOR)


LONG = {"max_steps": 8}
SET_UPS = {
    "LoRA": SetUp(LONG),
    "full": SetUp(
        LONG | {"learning_rate": 5e-3, "beta": 1e-12}, adapter=None, model=tiny.saved_llama, reference="start"
    ),
    "RLOO": SetUp(LONG, kind=LabelledRLOO),
    "three iterations": SetUp({"num_iterations": 3, "max_steps": 11, "learning_rate": 0.01}),
    "batches of 3 passes, steps of 2": SetUp({"steps_per_generation": 3, "max_steps": 9}),
    "absolute positions": SetUp(LONG | {"disable_dropout": True}, model=lambda folder: tiny.gpt2()),
    "soft-capped logits": SetUp(LONG | {"learning_rate": 0.1}, model=lambda folder: tiny.gemma2()),
}


def of_family(name: str, *, full: bool) -> SetUp:
    """100 updates of a family at a learning rate at which the limits are exceeded in most of them."""
    rate = {"gemma2": 0.1, "gpt2": 0.02}.get(name, 5e-3 if full else 0.02)
    changes = {"max_steps": 100, "learning_rate": rate, "disable_dropout": True, "beta": 1e-12}

    def model(folder: Path) -> nn.Module:
        FAMILIES[name]().save_pretrained(folder / "policy")
        return AutoModelForCausalLM.from_pretrained(folder / "policy")

    if not full:
        return SetUp(changes, model=lambda folder: FAMILIES[name]())
    return SetUp(changes, adapter=None, model=model, reference="start")


def limited(setup: SetUp, *limits: Limit, **others: Any) -> SetUp:
    return replace(setup, options={limit.option: limit.value for limit in limits} | others)


def assert_held(held: Run, limit: Limit) -> None:
    for number, window in enumerate(held.windows, 1):
        found, allowed = limit.dense(window), limit.allowed(window)
        configured, measured, guaranteed = limit.recorded(window.record)
        assert found <= allowed + ROUNDING, number
        assert configured == limit.value and measured <= guaranteed == pytest.approx(allowed, abs=ROUNDING), number
        assert measured == pytest.approx(found, abs=ROUNDING, rel=1e-4), number
        assert window.record["refused"] is None and window.record["trust"]["limit"] is None, number


@pytest.mark.parametrize("limit", LIMITS, ids=[limit.option for limit in LIMITS])
@pytest.mark.parametrize("name", SET_UPS)
def test_no_generation_batch_ends_beyond_the_limit(name, limit, tmp_path):
    held = run(limited(SET_UPS[name], limit), tmp_path)
    assert_held(held, limit)
    shortened = [window for window in held.windows if window.record["trust"]["scale"] < 1]
    assert len(shortened) > 0.5 * len(held.windows), "the limit was hardly needed"
    assert {window.record["trust"]["decided"] for window in shortened} == {limit.field}
    if name != "batches of 3 passes, steps of 2":  # of whose batches another one may have decided
        assert sum(limit.dense(window) > 0.3 * limit.value for window in shortened) > 0.5 * len(shortened)


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS, ids=[limit.option for limit in LIMITS])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_generation_batch_of_100_ends_beyond_the_limit(family, full, limit, tmp_path):
    held = run(limited(of_family(family, full=full), limit), tmp_path)
    assert len(held.windows) == 100
    assert_held(held, limit)
    shortened = [window for window in held.windows if window.record["trust"]["scale"] < 1]
    assert len(shortened) >= 10, "the limit was hardly needed"  # a policy that has collapsed moves little
    assert sum(limit.dense(window) > 0.3 * limit.value for window in shortened) > 0.5 * len(shortened)


@pytest.mark.parametrize("name", SET_UPS)
def test_without_a_limit_each_is_exceeded(name, tmp_path):
    setup = SET_UPS[name]
    free = run(replace(setup, changes=setup.changes | {"max_steps": 4}), tmp_path, limited=False)
    for limit in LIMITS:
        assert max(limit.dense(window) for window in free.windows) > limit.value, limit.option


def test_all_limits_hold_together(tmp_path):
    held = run(limited(SET_UPS["LoRA"], *LIMITS, max_kl=0.01), tmp_path)
    for window in held.windows:
        assert all(limit.dense(window) <= limit.allowed(window) + ROUNDING for limit in LIMITS)
        assert window.kl <= 0.01 + ROUNDING and window.record["trust"]["guaranteed"] == 0.01


@pytest.mark.parametrize(("controlled", "warned"), [(False, True), (True, False)])
def test_a_limit_at_which_training_may_stop_is_warned_of(controlled, warned, tmp_path, caplog):
    trainer = SetUp({"max_steps": 1, "beta": 0.1}).trainer(tmp_path)
    if controlled:
        trainer.add_callback(AdaptiveKLCallback(DualKL(coef=0.1, target=0.05), trainer=trainer))
    trainer.add_callback(TrustRegionCallback(trainer, anchor_max_kl=5.0))
    trainer.train()
    found = [record.message for record in caplog.records if "anchor_max_kl" in record.message]
    assert bool(found) == warned and all("training may stop there" in text for text in found)
