"""The steps of an update: mini-batches, gradient clipping, and the learning rates of policy and value."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from tests import tiny
from tests.watched import CUT, ENDED, optimizer_steps, run, watched
from tests.weights import same, trained_weights
from trl_trustkl import load_records
from trl_trustkl.controllers import LearningRateByKL
from trl_trustkl.policy import loading
from trl_trustkl.ppo.optimise import Optimisation, not_finite, separate_value
from trl_trustkl.types import AnchorMeasurement

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("epochs", "minis", "accumulation"), [(1, 1, 1), (2, 2, 2), (3, 4, 2), (1, 8, 2), (2, 2, 4)])
def test_every_mini_batch_of_every_epoch_makes_one_optimizer_step(
    tmp_path, monkeypatch, epochs, minis, accumulation, peft
):
    changes = {"num_ppo_epochs": epochs, "num_mini_batches": minis, "gradient_accumulation_steps": accumulation}
    # 16 prompts in batches of 4, 8 or 16: the last batch of a pass is among the updates.
    trainer = watched(tmp_path, changes=changes, peft_config=tiny.lora() if peft else None)
    steps = optimizer_steps(monkeypatch, trainer)
    trainer.train()
    assert Counter(steps) == dict.fromkeys((1, 2, 3), epochs * minis)
    assert [record["trust"]["epochs"] for record in load_records(tmp_path)] == [epochs] * 3
    assert [stats.steps for stats in trainer.seen["optimise"]] == [epochs * minis] * 3


def test_micro_batches_change_the_memory_and_not_the_step(tmp_path):
    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    undivided = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    split, complete = (
        trained_weights(run(tmp_path / name, changes=one_step | changes, script=[ENDED, CUT])[0].model)
        for name, changes in (("split", {}), ("complete", undivided))
    )
    for name, weight in split.items():
        torch.testing.assert_close(weight, complete[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", [0.05, 0.0, None, 1e9])
def test_max_grad_norm_limits_the_gradient_that_is_stepped(tmp_path, monkeypatch, limit):
    trainer = watched(tmp_path, changes={"max_grad_norm": limit, "max_steps": 1, "vf_coef": 10.0})
    norms: dict[str, list[float]] = {"policy": [], "value": []}
    create = trainer.create_optimizer

    def watching(*args: Any) -> Any:
        optimizer = create(*args)
        step = optimizer.step

        def norm_and_step(*a: Any, **k: Any) -> Any:
            for part, found in norms.items():
                grads = [p.grad for p in getattr(trainer.model, part).parameters() if p.grad is not None]
                found.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return step(*a, **k)

        monkeypatch.setattr(optimizer, "step", norm_and_step)
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", watching)
    trainer.train()
    gradient = load_records(tmp_path)[0]["gradient"]
    assert gradient["max_norm"] == (limit or None)
    if limit == 0.05:
        assert norms["policy"] == pytest.approx([0.05] * 4, rel=1e-4) == norms["value"]
        assert gradient["norm"] > 0.05 and 0 < gradient["scale"] < 1
    else:
        assert max(norms["policy"]) > 1.0
        assert gradient["norm"] == pytest.approx(sum(norms["policy"]) / 4, rel=1e-5) and gradient["scale"] == 1.0


def test_a_step_that_the_loss_scaler_skipped_is_not_counted(tmp_path, monkeypatch):
    """In fp16 the loss scale starts high: the first steps overflow, have an infinite norm, and are skipped."""
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 1, "num_ppo_epochs": 2, "num_mini_batches": 1})
    skipped = iter([True, False])
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    norms = iter([math.inf, math.inf, 2.0, 2.0])  # of policy and value, for each of two steps
    monkeypatch.setattr(Optimisation, "_clip", lambda self, parameters: torch.tensor(next(norms)))
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu", enabled=False))
    trainer.train()
    (record,) = load_records(tmp_path)
    assert record["gradient"] == {"norm": 2.0, "max_norm": 1.0, "scale": pytest.approx(0.5, rel=1e-5)}
    assert record["trust"]["epochs"] == 1 and record["refused"] is None


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_the_value_has_a_separate_learning_rate(tmp_path, rate):
    trainer = watched(tmp_path, changes={"value_learning_rate": rate, "max_steps": 1})
    before = trained_weights(trainer.model.value)
    trainer.train()
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in loading.trainable(trainer.model.value)} == {1e-3 if rate is None else rate}
    assert {rates[id(p)] for p in loading.trainable(trainer.model.policy)} == {1e-3}
    assert same(before, trained_weights(trainer.model.value)) == (rate == 0.0)


@pytest.mark.parametrize("target", [1e-4, 10.0], ids=["slower", "faster"])
def test_the_factor_scales_the_policys_learning_rate_and_changes_neither_schedule_nor_value(target, tmp_path):
    updates = 5
    changes = {
        "max_steps": updates,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "value_learning_rate": 3e-3,
        "trust_lr_target": target,
    }
    trainer = tiny.trainer(tmp_path, changes=changes)
    stepped: list[dict[str, float]] = []
    create = trainer.create_optimizer

    def watching(*args: Any) -> torch.optim.Optimizer:
        optimizer = create(*args)
        value = {id(p) for p in trainer.model.value.parameters()}

        def note(optimizer: Any, *_: Any) -> None:
            rates: dict[str, set[float]] = {"policy": set(), "value": set()}
            for group in optimizer.param_groups:
                for p in group["params"]:
                    rates["value" if id(p) in value else "policy"].add(group["lr"])
            stepped.append({name: one for name, (one,) in rates.items()})

        optimizer.register_step_pre_hook(note)
        return optimizer

    trainer.create_optimizer = watching
    trainer.train()
    rule = LearningRateByKL(target)
    state = rule.init()
    assert len(stepped) == 4 * updates
    for i, record in enumerate(load_records(tmp_path)):
        schedule = 1 - i / updates
        expected = {"policy": 1e-2 * schedule * state.coef, "value": 3e-3 * schedule}
        for rates in stepped[4 * i : 4 * i + 4]:
            assert rates == pytest.approx(expected, rel=1e-12)
        assert record["lr"] == pytest.approx(expected["policy"], rel=1e-12)
        share = 1 - state.coef
        assert (record["binding"] == "lr") <= (share > 0)
        state = rule.update(state, kl=record["trust"]["kl_proposed"], episodes=8)
    assert trainer.parts.coefficients.lr_state == state and (state.coef < 1) == (target == 1e-4)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}, "the factor changed the end of the schedule"


def two_groups() -> tuple[torch.optim.Optimizer, list[nn.Parameter], list[nn.Parameter]]:
    """An optimizer with the policy's tensors in two groups, the second of which holds the value's too."""
    policy, value = ([nn.Parameter(torch.zeros(1)) for _ in range(2)] for _ in range(2))
    groups = [{"params": policy[:1], "lr": 0.1, "weight_decay": 0.5}, {"params": [policy[1], *value], "lr": 0.2}]
    return torch.optim.AdamW(groups), policy, value


def test_the_values_parameters_move_into_groups_with_their_own_learning_rate():
    for rate in (None, 0.7):
        optimizer, policy, value = two_groups()
        separate_value(optimizer, value, rate=rate)
        first, second, third = optimizer.param_groups
        assert first["params"] == policy[:1] and second["params"] == policy[1:] and third["params"] == value
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2 if rate is None else 0.7]
        assert third["weight_decay"] == second["weight_decay"] != first["weight_decay"]


@pytest.mark.parametrize(
    ("coef", "kl", "kl_exact", "finite", "reason"),
    [
        (0.1, 1.0, 1.0, True, None),
        (0.1, math.nan, 1.0, True, "the KL to the reference is not finite"),
        (0.1, 1.0, math.inf, True, "the KL to the reference is not finite"),
        (0.0, math.nan, math.inf, True, None),
        (0.0, 1.0, 1.0, False, "an advantage or a return is not finite"),
    ],
)
def test_a_batch_that_is_not_finite_is_rejected_before_its_first_step(coef, kl, kl_exact, finite, reason):
    anchor, scored = AnchorMeasurement(coef, kl, kl_exact, 0.0, None, 0.0), SimpleNamespace(sampler_finite=True)
    batch = SimpleNamespace(anchor=anchor, scored=scored, finite=finite)
    assert not_finite(batch) == reason


def test_a_run_of_another_trainer_that_ended_within_an_accumulation_leaves_the_steps_of_this_one(tmp_path):
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 1})
    GradientState()._set_sync_gradients(False)
    trainer.train()
    assert load_records(tmp_path)[0]["trust"]["kl"] > 0
