"""Renewing the reference: by definition, for a full model and for adapters, in a run, and in checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SyncRefModelCallback

from tests import survival, tiny
from tests.watched import run
from trl_trustkl import load_records
from trl_trustkl.errors import CheckpointError, ConfigError
from trl_trustkl.policy.reference import Reference, build_reference
from trl_trustkl.policy.renewal import ReferenceRenewal
from trl_trustkl.policy.split_lm import SplitLM

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, LoraConfig | None] = {
    "full": None,
    "lora": LoraConfig(**LORA),
    "lora with biases": LoraConfig(**LORA, bias="all"),
    "lora with a saved module": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "dora": LoraConfig(**LORA, use_dora=True),
}
IDS = torch.arange(3, 15).view(2, 6)


def made(kind: str) -> Reference:
    """A policy that differs from its reference, which can be renewed."""
    policy: Any = tiny.llama(attention_bias=True)
    if KINDS[kind] is not None:
        policy = get_peft_model(policy, KINDS[kind])
    reference = build_reference(policy, SplitLM(policy), None, ref_adapter_name=None, start=None, renewed=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return reference


def logits(reference: Reference, *, of_reference: bool) -> torch.Tensor:
    with torch.no_grad():
        if not of_reference:
            return reference.policy(input_ids=IDS).logits
        with reference.active():
            return (reference.model or reference.policy)(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_1_makes_the_reference_the_policy_bit_for_bit(kind):
    reference = made(kind)
    policy = logits(reference, of_reference=False)
    assert not torch.equal(logits(reference, of_reference=True), policy)
    ReferenceRenewal(reference).renew(1.0)
    assert torch.equal(logits(reference, of_reference=True), policy)
    assert torch.equal(logits(reference, of_reference=False), policy), "the policy has changed"


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_mixes_the_weights_and_training_goes_on_as_before(kind):
    reference = made(kind)
    renewal = ReferenceRenewal(reference)
    trained = {name: p.detach().clone() for name, p in reference.policy.named_parameters() if p.requires_grad}
    before = {name: weight.clone() for name, weight in renewal.state_dict().items()}
    renewal.renew(0.25)
    once = {name: weight.clone() for name, weight in renewal.state_dict().items()}
    renewal.renew(1.0)
    for name, policy in renewal.state_dict().items():
        assert torch.allclose(once[name], 0.25 * policy + 0.75 * before[name], atol=1e-7), name
    assert any(not torch.equal(before[name], once[name]) for name in before)
    now = {name: p for name, p in reference.policy.named_parameters() if p.requires_grad}
    assert now.keys() == trained.keys() and all(torch.equal(now[name], trained[name]) for name in now)


def test_a_full_model_is_renewed_as_by_trls_callback():
    reference, other = made("full"), made("full")
    for _ in range(3):
        ReferenceRenewal(reference).renew(0.6)
        SyncRefModelCallback._sync_target_model(other.policy, other.model, 0.6)
    for mine, theirs in zip(reference.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_renewed_reference_are_loaded_bit_for_bit(kind):
    reference, other = made(kind), made(kind)
    ReferenceRenewal(reference).renew(0.3)
    saved = {name: weight.clone() for name, weight in ReferenceRenewal(reference).state_dict().items()}
    ReferenceRenewal(other).load_state_dict(saved)
    assert torch.equal(logits(other, of_reference=True), logits(reference, of_reference=True))
    for broken in ({}, saved | {"more": torch.zeros(1)}, {name: weight[:1] for name, weight in saved.items()}):
        with pytest.raises(CheckpointError, match="other names or shapes than those of this reference"):
            ReferenceRenewal(other).load_state_dict(broken)


# -- in a run ----------------------------------------------------------------------------------------------------------

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 1e-2, "max_steps": 5}


@pytest.mark.parametrize("peft", [{}, {"peft_config": None}], ids=["adapter", "full"])
def test_the_record_says_when_and_the_kl_starts_anew(tmp_path, peft):
    _, records = run(tmp_path / "renewed", changes=SYNC | {"ref_model_mixup_alpha": 1.0}, **peft)
    assert [record["anchor"]["renewed"] for record in records] == [False, True, False, True, False]
    kl = [record["anchor"]["kl_exact"] for record in records]
    assert kl[0] == kl[2] == kl[4] == 0.0 and kl[1] > 0.01 and kl[3] > 0.01
    _, mixed = run(tmp_path / "mixed", changes=SYNC, **peft)
    assert kl[1] == mixed[1]["anchor"]["kl_exact"] and mixed[2]["anchor"]["kl_exact"] > 0.0
    _, fixed = run(tmp_path / "fixed", changes=SYNC | {"sync_ref_model": False, "ref_model_sync_steps": 512}, **peft)
    assert kl[1] == fixed[1]["anchor"]["kl_exact"] and not any(record["anchor"]["renewed"] for record in fixed)
    assert mixed[2]["anchor"]["kl_exact"] < fixed[2]["anchor"]["kl_exact"]


@pytest.mark.parametrize("kind", survival.KINDS)
def test_a_run_with_a_renewed_reference_is_resumed_bit_for_bit(tmp_path, kind):
    changes = {"sync_ref_model": True, "ref_model_sync_steps": 3, "kl_coef": 0.1}
    survival.build(tmp_path / "uninterrupted", kind, **changes).train()
    trainer = survival.build(tmp_path / "resumed", kind, **changes)
    assert survival.cut_off(trainer, ("rollout", 4)) is not None
    assert (tmp_path / "resumed" / "checkpoint-4" / "reference.safetensors").exists()
    survival.build(tmp_path / "resumed", kind, **changes).train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "resumed")
    assert [row["anchor"]["renewed"] for row in load_records(tmp_path / "resumed")] == [False, False, True] * 2


def test_an_update_that_is_rejected_changes_nothing_of_when(tmp_path):
    _, records = run(tmp_path, changes=SYNC | {"panic_kl": 1e-9, "max_refused": 9})
    assert all(record["refused"] for record in records)
    assert [record["anchor"]["renewed"] for record in records] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "arguments", "pieces"),
    [
        ({"kl_coef": 0.0}, {}, "`sync_ref_model` got True with kl_coef=0"),
        ({"sync_ref_model": False}, {}, "`ref_model_sync_steps` got 2, but sync_ref_model=False ignores it"),
        ({}, {"ref_model": tiny.llama()}, "`sync_ref_model` got True with a `ref_model` and a policy with an adapter"),
        (
            {},
            {"ref_model": tiny.llama(hidden_size=64), "peft_config": None},
            "`ref_model` and the policy have different",
        ),
    ],
)
def test_a_reference_that_cannot_be_renewed_is_an_error(tmp_path, changes, arguments, pieces):
    with pytest.raises(ConfigError, match=pieces):
        tiny.trainer(tmp_path, changes=SYNC | changes, **arguments)


def test_another_adapter_is_renewed_if_it_is_of_the_same_kind(tmp_path):
    policy = get_peft_model(tiny.llama(), LoraConfig(**LORA))
    policy.add_adapter("first", LoraConfig(**LORA, init_lora_weights=False))
    policy.add_adapter("wide", LoraConfig(**LORA | {"r": 8}))
    changes = SYNC | {"ref_model_mixup_alpha": 1.0, "max_steps": 3}
    trainer = tiny.trainer(
        tmp_path / "a", model=policy, peft_config=None, changes=changes | {"ref_adapter_name": "first"}
    )
    trainer.train()
    assert [record["anchor"]["kl_exact"] == 0 for record in load_records(tmp_path / "a")] == [False, False, True]
    with pytest.raises(ConfigError, match="`ref_adapter_name` 'wide' and the policy have different weights"):
        tiny.trainer(tmp_path / "b", model=policy, peft_config=None, changes=changes | {"ref_adapter_name": "wide"})
