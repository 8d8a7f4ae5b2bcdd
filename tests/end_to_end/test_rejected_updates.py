"""Updates that are not finite or go too far are rejected and rolled back, and the run continues."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests import tiny
from tests.survival import build
from tests.weights import WatchWeights, same
from trl_trustkl import load_records
from trl_trustkl.errors import RefusedError
from trl_trustkl.run import checkpoint_folder as checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

NAN, INF = math.nan, math.inf

BAD_UPDATE = 2
"""Counted from 1, as in the records."""


def nan_gradient(monkeypatch, trainer):
    """The policy's gradient is NaN in the second of the bad update's four steps."""
    parameter = next(p for p in trainer.model.policy.parameters() if p.requires_grad)
    steps = []

    def hook(gradient: Tensor) -> Tensor:
        bad = trainer.state.global_step == BAD_UPDATE - 1 and len(steps) % 4 == 1
        return gradient * NAN if bad else gradient

    parameter.register_hook(hook)
    count_steps(monkeypatch, trainer, steps)


def nan_value_gradient(monkeypatch, trainer):
    """The value's gradient is infinite in the first of the bad update's steps."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient * (INF if trainer.state.global_step == BAD_UPDATE - 1 else 1.0)

    trainer.model.value.linear.bias.register_hook(hook)


def nan_reference(monkeypatch, trainer):
    """The reference gives NaN in the bad update."""
    snapshot = trainer.reference.snapshot

    def poisoned(micro):
        found = snapshot(micro)
        bad = trainer.state.global_step == BAD_UPDATE - 1
        return found._replace(hidden=found.hidden * NAN) if bad else found

    monkeypatch.setattr(trainer.reference, "snapshot", poisoned)


def overflowing_reward(monkeypatch, trainer):
    """A reward so large that the squared error of the value is not finite."""
    score = trainer.score
    huge = torch.tensor([3e38, -3e38] * 4)

    def scored(rollout):
        found = score(rollout)
        return found._replace(scores=huge) if trainer.state.global_step == BAD_UPDATE - 1 else found

    monkeypatch.setattr(trainer, "score", scored)


def nan_weights_after_the_last_step(monkeypatch, trainer):
    """Weights that are NaN when the update is measured."""
    optimise = trainer.optimise

    def poisoned(batch):
        stats = optimise(batch)
        if trainer.state.global_step == BAD_UPDATE - 1:
            with torch.no_grad():
                next(p for p in trainer.model.policy.parameters() if p.requires_grad).fill_(NAN)
        return stats

    monkeypatch.setattr(trainer, "optimise", poisoned)


def count_steps(monkeypatch, trainer, steps: list) -> None:
    """One entry in `steps` for each optimizer step taken."""
    create = trainer.create_optimizer

    def counted(*args):
        optimizer = create(*args)
        step = optimizer.step
        monkeypatch.setattr(optimizer, "step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", counted)


REFUSALS = [
    (nan_gradient, "the policy's gradient is not finite in epoch 1, step 2 of 4"),
    (nan_value_gradient, "the value's gradient is not finite in epoch 1, step 1 of 4"),
    (nan_reference, "the KL to the reference is not finite"),
    (overflowing_reward, "an advantage or a return is not finite"),
    (nan_weights_after_the_last_step, "the KL(π_old‖π) measured after it is not finite"),
]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("poison", "reason"), REFUSALS, ids=[poison.__name__ for poison, _ in REFUSALS])
def test_a_step_that_is_not_finite_is_rejected_and_the_run_continues(
    tmp_path, monkeypatch, caplog, poison, reason, peft
):
    watch = WatchWeights()
    trainer = tiny.trainer(tmp_path, callbacks=[watch], peft_config=tiny.lora() if peft else None)
    poison(monkeypatch, trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    first, bad, last = load_records(tmp_path)
    assert first["refused"] is None and last["refused"] is None
    assert reason in bad["refused"] and bad["update"] == BAD_UPDATE
    said = [record.getMessage() for record in caplog.records if "is rejected" in record.getMessage()]
    assert len(said) == 1 and f"update {BAD_UPDATE} is rejected" in said[0] and reason in said[0]
    # The policy is restored bit for bit, measured there, and changes again in the next update.
    before, after, end = (policy_of(snapshot) for snapshot in watch.snapshots[1:])
    assert same(before, after) and not same(after, end)
    assert bad["trust"]["kl"] == 0.0 and bad["trust"]["max_ratio"] == 1.0
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def policy_of(snapshot: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in snapshot.items() if name.startswith("policy.")}


@pytest.mark.parametrize(
    "poison",
    [poison for poison, _ in REFUSALS],
)
def test_a_rejected_update_leaves_the_value_unchanged_too(tmp_path, monkeypatch, poison):
    watch = WatchWeights()
    trainer = tiny.trainer(tmp_path, callbacks=[watch])
    poison(monkeypatch, trainer)
    trainer.train()
    assert same(watch.snapshots[1], watch.snapshots[2])


def beyond_panic(monkeypatch, trainer):
    """The bad update exceeds panic_kl."""
    measure, measured = trainer.measure, []

    def far(batch):
        found = measure(batch)
        measured.append(trainer.state.global_step)
        first = measured.count(BAD_UPDATE - 1) == 1 and measured[-1] == BAD_UPDATE - 1
        return found._replace(kl=1e9) if first else found

    monkeypatch.setattr(trainer, "measure", far)


@pytest.mark.parametrize("limit", [1.0, None], ids=["limit", "no limit"])
@pytest.mark.parametrize("poison", [*(poison for poison, _ in REFUSALS), beyond_panic])
def test_a_rejected_update_has_no_binding_mechanism_and_keeps_no_part_of_its_step(tmp_path, monkeypatch, poison, limit):
    """An update may be rolled back while optimising or after it; the gradient limit binds the other updates."""
    changes = {"trust_max_kl": limit, "panic_kl": 1e6, "max_grad_norm": 1e-9, "kl_coef": 1e-3, "optim": "sgd"}
    trainer = tiny.trainer(tmp_path, changes=changes)
    poison(monkeypatch, trainer)
    trainer.train()
    bad = BAD_UPDATE - 1
    found = load_records(tmp_path)
    assert [record["refused"] is None for record in found] == [i != bad for i in range(3)]
    assert [record["binding"] for record in found] == ["none" if i == bad else "grad_norm" for i in range(3)]
    kept = [None] * 3 if limit is None else [0.0 if i == bad else 1.0 for i in range(3)]
    assert [record["trust"]["scale"] for record in found] == kept
    assert found[bad]["trust"]["kl"] == 0 and found[bad]["trust"]["guaranteed"] == limit


class Spike(TrainerCallback):
    """A learning rate that breaks policy and value in the first update, and a normal one after it."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e36 if state.global_step == 0 else 1e-3


SPIKED = {"optim": "sgd", "max_grad_norm": 0.0, "num_ppo_epochs": 1}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_value_head_that_becomes_non_finite_does_not_end_the_run(tmp_path, steps):
    tiny.trainer(tmp_path, changes=SPIKED | {"num_mini_batches": steps}, callbacks=[Spike()]).train()
    refused = [record["refused"] for record in load_records(tmp_path)]
    assert refused[0] is not None and refused[1:] == [None, None]


def test_a_value_model_that_becomes_non_finite_ends_the_run_with_the_policy_unchanged(tmp_path):
    """A separate value model is not rolled back, so that no later update is finite and the run ends with an error."""
    changes = SPIKED | {"num_mini_batches": 1, "max_refused": 3}
    model = tiny.scalar_model(tiny.llama())
    trainer = tiny.trainer(tmp_path, changes=changes, value_model=model, callbacks=[Spike()])
    before = [p.detach().clone() for p in trainer.model.policy.parameters()]
    with pytest.raises(RefusedError):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.policy.parameters(), strict=True))


def test_a_kl_that_is_not_finite_never_reaches_the_controller(tmp_path, monkeypatch):
    changes = {"kl_controller": "adaptive", "kl_target": 1.0, "kl_horizon": 100}
    trainer = tiny.trainer(tmp_path, changes=changes)
    nan_reference(monkeypatch, trainer)
    trainer.train()
    first, bad, last = load_records(tmp_path)
    assert bad["anchor"]["kl_exact"] is None
    assert first["anchor"]["coef"] > bad["anchor"]["coef"] == last["anchor"]["coef"] > 0


def test_an_update_that_is_rolled_back_restores_the_optimizer(tmp_path):
    trainer = build(
        tmp_path, panic_kl=1e-9, max_refused=3, save_strategy="no", max_steps=5, lr_scheduler_type="constant"
    )
    with pytest.raises(RefusedError) as error:
        trainer.train()
    for piece in ("3 updates in a row", "max_refused=3", "panic_kl", "checkpoint-3", "learning_rate"):
        assert piece in str(error.value)
    found = load_records(tmp_path)
    assert len(found) == 3 and all("above panic_kl = 1e-09" in record["refused"] for record in found)
    assert all(record["trust"]["kl"] == 0 < record["trust"]["kl_proposed"] for record in found)
    fresh = build(tmp_path / "fresh")
    after = dict(trainer.model.named_parameters())
    assert all(
        torch.equal(weight, after[name]) for name, weight in fresh.model.named_parameters() if weight.requires_grad
    )
    assert not trainer.optimizer.state
    assert checkpoint.damage(tmp_path / "checkpoint-3") is None


def test_rejected_updates_that_are_not_in_a_row_do_not_end_a_run(tmp_path):
    def sometimes(prompts: list, completions: list, trainer_state: Any = None, **_: Any) -> list[float]:
        good = tiny.good_words(prompts, completions)
        return [float("nan"), *good[1:]] if trainer_state.global_step % 2 else good

    trainer = tiny.trainer(tmp_path, changes={"max_steps": 6, "max_refused": 2}, reward_funcs=sometimes)
    output = trainer.train()
    found = load_records(tmp_path)
    assert [record["refused"] is not None for record in found] == [False, True] * 3
    assert "`sometimes` returned nan for completion 0" in found[1]["refused"] and found[1]["score"] is None
    assert output.metrics["refused_updates"] == 3
