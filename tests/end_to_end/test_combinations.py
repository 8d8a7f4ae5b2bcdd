"""Several mechanisms in one run: the limits hold, the records are right, and a killed run resumes.

This file is also the program whose forked children are the two processes of the first test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests import survival, tiny
from tests.end_to_end.careful import careful
from tests.pinned import on_pinned_transformers
from tests.survival import pair
from tests.tiny import FAST, LIMIT
from tests.watched import before_the_first_step
from tests.witness import assert_within, witnessed
from trl_trustkl import load_records
from trl_trustkl.policy.loading import trainable
from trl_trustkl.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")
STEERED_LIMIT, STOP = 2e-3, 4e-3
STEERED = {
    "clip_rule": "gspo",
    "trust_stop": STOP,
    "trust_max_kl": STEERED_LIMIT,
    "num_ppo_epochs": 3,
    "trust_lr_target": None,
    "trust_coef": 0.02,
    "trust_target": STEERED_LIMIT,
}
"""In addition to those of `survival.build`: an exact anchor in reward and loss, and a controller for each coefficient."""


def main(folder: Path) -> None:
    """An uninterrupted run, and one whose second process is killed in a rerun of the third update and which is resumed."""
    survival.load_all(folder)

    def train(run: Path, resume: bool = False) -> None:
        survival.build(run, **STEERED).train(resume_from_checkpoint=resume)

    def killed(run: Path) -> None:
        trainer = survival.build(run, **STEERED)
        at = ("enforce", 3) if trainer.accelerator.process_index == 1 else -1
        survival.cut_off(trainer, at, lambda name: os.kill(os.getpid(), signal.SIGKILL))

    uninterrupted, run, log = (folder / name for name in ("uninterrupted", "killed", "log"))
    found = {
        "uninterrupted": pair(uninterrupted, log, train),
        "killed": pair(run, log, killed),
        "left": len(load_records(run)),
    }
    print(json.dumps(found | {"resumed": pair(run, log, lambda run: train(run, resume=True))}), flush=True)


@on_pinned_transformers("Older ones read a CPU's optimizer onto `cpu:0`, which torch does not know.")
@pytest.mark.processes
def test_a_sequence_rule_a_stop_and_a_limit_in_two_processes_survive_a_kill(tmp_path):
    (found,) = survival.program("tests.end_to_end.test_combinations", tmp_path)
    assert found == {"uninterrupted": [0, 0], "killed": [1, -signal.SIGKILL], "left": 2, "resumed": [0, 0]}
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "killed")
    records = load_records(tmp_path / "killed")
    assert [record["update"] for record in records] == [*range(1, survival.UPDATES + 1)]
    for record in records:
        trust = record["trust"]
        assert trust["rule"] == "gspo" and record["refused"] is None
        assert 0 < trust["kl"] <= STEERED_LIMIT == trust["guaranteed"] and trust["kl"] <= trust["kl_max"]
        assert (trust["scale"] < 1) == (trust["kl_proposed"] > STEERED_LIMIT) == (trust["tries"] > 0)
        assert trust["stopped"] == (trust["epochs"] < STEERED["num_ppo_epochs"])
    assert any(record["trust"]["stopped"] for record in records), "no update was stopped"
    assert any(record["trust"]["scale"] < 1 for record in records), "no update was shortened"


EXACT = {
    "kl_estimator": "exact",
    "kl_placement": "both",
    "kl_coef": 0.3,
    "trust_coef": 0.5,
    "num_mini_batches": 1,
    "max_grad_norm": None,
}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
PIECES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def gradient(trainer: Any, batch: Batch) -> Tensor:
    """The gradient of the entire batch, at a policy a fixed step away from the one that sampled it."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable(trainer.model.policy):
        parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    args, indices = trainer.args, [*range(len(batch.scored.micro_batches))]
    penalties = args.build_penalties(batch.anchor.coef * batch.advantage_scale, batch.trust_coef)
    trainer.parts.optimisation._backward(batch, indices, args.build_surrogate(), penalties)
    return torch.cat([p.grad.flatten().double() for p in trainable(trainer.model)])


@pytest.mark.parametrize(("bf16", "near"), [(False, 1e-5), (True, 0.05)], ids=["float32", "bf16"])
def test_exact_divergences_in_pieces_give_the_complete_gradient(bf16, near, tmp_path):
    """In bf16 only up to its precision: passes of other shapes round differently."""
    trainers = [tiny.trainer(tmp_path, changes=EXACT | {"bf16": bf16} | split) for split in (WHOLE, PIECES)]
    rollout, _ = (before_the_first_step(trainer).scored.rollout for trainer in trainers)
    ends = torch.arange(6) <= torch.tensor([0, 5, 2, 5, 1, 5, 3, 5]).unsqueeze(-1)  # pieces of unequal weight
    rollout = rollout._replace(response_mask=rollout.response_mask & ends)
    batches = [trainer.advantages(trainer.score(rollout)) for trainer in trainers]
    assert [len(batch.scored.micro_batches) for batch in batches] == [1, 4]
    for trainer, batch in zip(trainers, batches, strict=True):
        measured = trainer.measure(batch)
        assert measured.kl == 0.0 and measured.max_ratio == 1.0
    one, other = (gradient(*both) for both in zip(trainers, batches, strict=True))
    assert (one - other).norm() <= near * one.norm()


VALUES = {
    "full": lambda: tiny.scalar_model(tiny.llama()),
    "LoRA": lambda: get_peft_model(tiny.scalar_model(tiny.llama()), tiny.lora(task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_model_and_the_adapter_of_a_4_bit_policy_are_trained_and_resumed(value, tmp_path):
    def build(folder: Path) -> Any:
        changes = {"max_steps": survival.UPDATES, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        changes |= {"gradient_checkpointing": True, "trust_max_kl": 0.02, "optim": "adamw_torch", "vf_coef": 1.0}
        arguments = {"value_model": VALUES[value](), "reward_funcs": survival.noisy_reward}
        return tiny.trainer(folder, tiny.four_bit(tmp_path), changes=changes, **arguments)

    trainer = build(tmp_path / "uninterrupted")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == moved
    policy = {name for name in moved if name.startswith("policy.")}
    assert policy and all("lora_" in name for name in policy)
    assert any(name.startswith("value.") for name in moved)
    assert any(before[name].dtype == torch.uint8 for name in before.keys() - moved), "no weight is in 4 bits"
    assert all(record["trust"]["kl"] <= 0.02 for record in load_records(tmp_path / "uninterrupted"))
    assert survival.cut_off(build(tmp_path / "cut"), ("measure", 4)) == "measure"
    build(tmp_path / "cut").train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "cut")


@pytest.mark.parametrize("rule", ["gspo", "none", "spo", "dppo_kl", "drpo", "troll"])
def test_mechanisms_work_together_and_the_limit_still_holds(rule, tmp_path):
    changes = FAST | {
        "max_steps": 3,
        "clip_rule": rule,
        "trust_stop": 0.5,
        "response_mask_kl": 0.05,
        "trust_coef": 0.5,
        "trust_controller": "threshold",
        "trust_target": LIMIT,
        "trust_lr_target": LIMIT,
        "kl_coef": 0.1,
        "kl_estimator": "exact",
        "kl_placement": "both",
        "kl_controller": "adaptive",
        "kl_target": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    trainer = careful(tmp_path, changes=changes)
    trainer.train()
    records = load_records(tmp_path)
    assert len(records) == 3
    for record, dense in zip(records, trainer.dense, strict=True):
        trust = record["trust"]
        assert trust["kl"] <= LIMIT == trust["guaranteed"]
        assert dense == pytest.approx(trust["kl"], abs=2e-3)
        assert record["anchor"]["placement"] == "both" and record["anchor"]["gradient"] == "exact"
        assert record["refused"] is None
    assert any(record["trust"]["scale"] < 1 for record in records)


def test_a_stop_and_a_limit_work_one_after_the_other(tmp_path):
    trainer = witnessed(tmp_path, changes=FAST | {"trust_stop": 1e-9, "num_ppo_epochs": 3})
    trainer.train()
    assert_within(trainer.updates, LIMIT)
    for record, _, _ in trainer.updates:
        assert record.trust.stopped and record.trust.scale < 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
