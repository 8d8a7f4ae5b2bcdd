"""`trust_max_kl` on every kind of model: the limit holds, and only the policy moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.end_to_end.careful import FULL, assert_equal, careful
from tests.tiny import FAST, LIMIT
from tests.witness import assert_within, witnessed
from trl_trustkl import load_records
from trl_trustkl.policy.loading import trainable
from trl_trustkl.types import Batch, Measurement

pytestmark = pytest.mark.filterwarnings("ignore")


def bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


# (model, changes of the configuration, further arguments, tolerance between the trainer's passes and a dense one)
KINDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], Callable[[], dict[str, Any]], float]] = {
    "LoRA": (lambda _: tiny.llama(), {}, dict, 1e-5),
    "LoRA, gpt2": (lambda _: tiny.gpt2(), {}, dict, 1e-5),
    "LoRA with a trained head": (
        lambda _: tiny.llama(), {}, lambda: {"peft_config": tiny.lora(modules_to_save=["lm_head"])}, 1e-5,
    ),
    "4-bit": (tiny.four_bit, {}, dict, 1e-5),
    "full": (lambda _: tiny.llama(), {"learning_rate": 5e-3}, lambda: FULL, 1e-5),
    "full, tied head": (lambda _: tiny.gpt2(), {"learning_rate": 5e-3}, lambda: FULL, 1e-5),
    "full, bf16 weights": (lambda _: bfloat16(tiny.llama()), {"learning_rate": 1e-2}, lambda: FULL, 2e-3),
    "bf16 autocast": (lambda _: tiny.llama(), {"bf16": True}, dict, 2e-3),
    "full, bf16 autocast": (lambda _: tiny.llama(), {"bf16": True, "learning_rate": 5e-3}, lambda: FULL, 2e-3),
    "four micro-batches": (
        lambda _: tiny.llama(),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 1},
        dict,
        1e-5,
    ),
    "gradient checkpointing": (lambda _: tiny.llama(), {"gradient_checkpointing": True}, dict, 1e-5),
    "value model": (lambda _: tiny.llama(), {}, lambda: {"value_model": tiny.scalar_model(tiny.llama())}, 1e-5),
    "attached value head": (lambda _: tiny.llama(), {"detach_value_head": False}, dict, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_holds_and_moments_value_and_frozen_weights_stay_unchanged(kind, tmp_path):
    model, changes, arguments, agreement = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes=changes, **arguments())
    trainer.train()
    dtypes = {p.dtype for p in trainable(trainer.model.policy)}
    assert dtypes == {torch.bfloat16 if kind == "full, bf16 weights" else torch.float32}
    for record, dense in zip(load_records(tmp_path / "run"), trainer.dense, strict=True):
        trust = record["trust"]
        assert trust["kl_proposed"] > 2 * LIMIT, "the update did not exceed the limit"
        assert trust["kl"] <= LIMIT == trust["guaranteed"] == trust["limit"]
        assert 0 < trust["scale"] < 1 <= trust["tries"]
        assert dense == pytest.approx(trust["kl"], abs=agreement)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_ends_on_the_line_from_old_to_proposed(kind, tmp_path):
    model, changes, arguments, _ = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes={"max_steps": 1, **changes}, **arguments())
    trainer.train()
    scale = load_records(tmp_path / "run")[0]["trust"]["scale"]
    for p, old, new in zip(trainable(trainer.model.policy), trainer.before, trainer.proposed, strict=True):
        assert torch.equal(p, torch.lerp(old, new, scale))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_restores_the_old_policy_bit_for_bit(kind, tmp_path):
    model, changes, arguments, _ = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes={"max_steps": 1, **changes}, **arguments())
    measure, asked = trainer.measure, []

    def too_large(batch: Batch) -> Measurement:
        """The measurement, with a KL beyond the limit for the proposal and all ten tries."""
        asked.append(measure(batch))
        return asked[-1]._replace(kl=1.0) if len(asked) <= 11 else asked[-1]

    trainer.measure = too_large
    trainer.train()
    trust = load_records(tmp_path / "run")[0]["trust"]
    assert (trust["scale"], trust["tries"], trust["kl"], trust["max_ratio"]) == (0.0, 10, 0.0, 1.0)
    assert not all(map(torch.equal, trainer.before, trainer.proposed)), (
        "the update moved nothing that could be restored"
    )
    assert_equal(trainer.before, trainable(trainer.model.policy))


@pytest.mark.parametrize("value", ["head", "model"])
def test_enforcement_leaves_the_steps_of_the_value_as_they_were(value, tmp_path):
    """The value after an enforced update equals the value after the same update without a limit."""
    ends = {}
    for limit in (None, LIMIT):
        arguments = {"value_model": tiny.scalar_model(tiny.llama())} if value == "model" else {}
        trainer = careful(tmp_path / str(limit), changes={"max_steps": 1, "trust_max_kl": limit}, **arguments)
        start = [p.detach().clone() for p in trainer.model.value.parameters()]
        trainer.train()
        ends[limit] = [p.detach().clone() for p in trainer.model.value.parameters()], trainer.proposed, trainer
        assert not all(map(torch.equal, start, ends[limit][0])), "the value did not move"
    assert_equal(ends[None][0], ends[LIMIT][0])
    assert_equal(ends[None][1], ends[LIMIT][1])
    assert_equal(ends[None][2].optimizer.state_dict(), ends[LIMIT][2].optimizer.state_dict())
    assert load_records(tmp_path / str(LIMIT))[0]["trust"]["scale"] < 1


def test_a_limit_that_is_not_reached_changes_no_bit_of_the_run(tmp_path):
    runs = {}
    for limit in (None, 1e3):
        trainer = careful(tmp_path / str(limit), changes={"trust_max_kl": limit, "max_steps": 3})
        trainer.train()
        runs[limit] = trainable(trainer.model), load_records(tmp_path / str(limit))
    assert_equal(runs[None][0], runs[1e3][0])
    for free, held in zip(runs[None][1], runs[1e3][1], strict=True):
        assert free["trust"]["kl"] == held["trust"]["kl"] == held["trust"]["kl_proposed"]
        assert (held["trust"]["scale"], held["trust"]["tries"], held["trust"]["guaranteed"]) == (1.0, 0, 1e3)
        assert (free["trust"]["scale"], free["trust"]["tries"], free["trust"]["guaranteed"]) == (None, 0, None)


def test_every_response_token_is_measured_rows_without_a_reward_included(tmp_path):
    def half(prompts: list, completions: list, **_: Any) -> list[float | None]:
        return [None if i % 2 else score for i, score in enumerate(tiny.good_words(prompts, completions))]

    trainer = witnessed(tmp_path, changes=FAST, reward_funcs=half)
    trainer.train()
    assert_within(trainer.updates, LIMIT)
    assert all(update.record.trust.scale < 1 for update in trainer.updates)


def test_without_a_limit_a_part_of_the_batch_may_be_measured_and_guarantees_nothing(tmp_path):
    changes = FAST | {"trust_max_kl": None, "measure_fraction": 0.5}
    trainer = tiny.trainer(tmp_path, changes=changes)
    seen, measure = [], trainer.measure
    trainer.measure = lambda batch: (seen.append(measure(batch)), seen[-1])[1]
    trainer.train()
    assert not any(measured.complete for measured in seen)
    assert all(record["trust"]["guaranteed"] is None for record in load_records(tmp_path))
