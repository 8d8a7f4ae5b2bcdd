"""The coefficients in a run: they follow the KL that is measured, and reach checkpoints."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback

from tests import tiny
from tests.tiny import FAST, LIMIT
from tests.watched import run
from trl_trustkl import load_records
from trl_trustkl.controllers import AdaptiveKL, ThresholdKL

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_adaptive_controller_follows_ziegler_from_the_exact_kl(tmp_path):
    changes = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100, "kl_coef": 0.2}
    changes |= {"kl_controller_kwargs": {"clip": 2.0}, "learning_rate": 1e-2, "max_steps": 6}
    trainer, records = run(tmp_path, changes=changes)
    expected = [0.2]
    for record in records:
        error = min(max(record["anchor"]["kl_exact"] / 0.5 - 1, -2.0), 2.0)
        expected.append(expected[-1] * (1 + error * 8 / 100))
    coefs = [*(record["anchor"]["coef"] for record in records), trainer.parts.coefficients.kl_state.coef]
    assert coefs == pytest.approx(expected, rel=1e-9)
    assert trainer.parts.coefficients.kl_controller == AdaptiveKL(0.2, 0.5, horizon=100, clip=2.0)
    assert coefs[1] < coefs[0] and coefs[-1] > min(coefs)  # down from a KL of 0, and up again later
    assert any(abs(record["anchor"]["kl"] - record["anchor"]["kl_exact"]) > 0.05 for record in records)


def test_a_fixed_coefficient_stays_and_may_be_changed_by_a_callback(tmp_path):
    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.kl_coef /= 2

    assert [r["anchor"]["coef"] for r in run(tmp_path / "one")[1]] == [0.05] * 3
    assert [r["anchor"]["coef"] for r in run(tmp_path / "two", callbacks=[Halve()])[1]] == [0.05, 0.025, 0.0125]


@pytest.mark.parametrize(
    ("name", "kwargs", "controller"),
    [
        ("threshold", None, ThresholdKL(0.1, LIMIT)),
        ("adaptive", {"horizon": 40}, AdaptiveKL(0.1, LIMIT, horizon=40)),
    ],
)
@pytest.mark.parametrize("rate", [5e-2, 1e-5], ids=["too far", "too near"])
def test_the_controller_moves_the_penalty_by_the_proposed_kl(name, kwargs, controller, rate, tmp_path):
    changes = FAST | {
        "max_steps": 4,
        "learning_rate": rate,
        "trust_controller": name,
        "trust_controller_kwargs": kwargs,
        "trust_coef": 0.1,
        "trust_target": LIMIT,
    }
    trainer = tiny.trainer(tmp_path, changes=changes)
    used, advantages = [], trainer.advantages
    trainer.advantages = lambda scored: (used.append(advantages(scored)), used[-1])[1]
    trainer.train()
    state = controller.init()
    for record, batch in zip(load_records(tmp_path), used, strict=True):
        assert record["trust"]["coef"] == batch.trust_coef == state.coef, (
            "the coefficient of the record is not the one used"
        )
        kl = record["trust"]["kl_proposed"]
        assert (kl > 1.5 * LIMIT) == (rate == 5e-2)
        state = controller.update(state, kl=max(0.0, kl), episodes=8)
    assert trainer.parts.coefficients.trust_state == state
    assert (state.coef > 0.1) == (rate == 5e-2)


def test_the_factor_is_fed_the_proposed_kl_and_not_the_enforced_one(tmp_path):
    changes = FAST | {"max_steps": 3, "trust_lr_target": LIMIT}
    tiny.trainer(tmp_path, changes=changes).train()
    rates = [record["lr"] for record in load_records(tmp_path)]
    assert all(record["trust"]["kl"] <= LIMIT for record in load_records(tmp_path))
    assert rates == pytest.approx([5e-2, 5e-2 / 1.5, 5e-2 / 1.5**2])


def test_the_states_of_all_controllers_are_in_the_checkpoint(tmp_path):
    changes = {
        "max_steps": 3,
        "seed": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "kl_controller": "pid",
        "kl_target": 0.5,
        "trust_controller": "dual",
        "trust_coef": 0.1,
        "trust_target": 1e-3,
        "trust_lr_target": 1e-6,
    }
    states = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            now = trainer.parts.coefficients
            states.append((now.kl_state, now.trust_state, now.lr_state))

    trainer = tiny.trainer(tmp_path, changes=changes, callbacks=[Keep()])
    trainer.train()
    assert len(states) == 3
    names = ("kl_controller", "trust_controller", "lr_controller")
    for update, live in enumerate(states, start=1):
        saved = json.loads((tmp_path / f"checkpoint-{update}" / "trustkl_state.json").read_text())
        assert set(names) <= set(saved)
        for name, state in zip(names, live, strict=True):
            assert type(state)(**saved[name]) == state
    assert all(len(set(kind)) > 1 for kind in zip(*states, strict=True)), "a state did not move"
