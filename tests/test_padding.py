"""Architectures with a memory: those that keep padding out of it, and those that do not, which a warning names."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.pinned import on_pinned_transformers
from tests.test_attacks import before_the_first_step
from trl_trustkl import load_records
from trl_trustkl.policy.split_lm import SplitLM

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
SOUND: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8},
    "Jamba": ATTENTION | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "FalconH1": ATTENTION | SSM | {"mamba_d_ssm": 64},
    "Lfm2": ATTENTION | {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": ATTENTION | EXPERTS | HYBRID | DELTA | {"moe_intermediate_size": 16},
}
LEAKY: dict[str, dict[str, Any]] = {
    "Rwkv": {"attention_hidden_size": 32},
    "RecurrentGemma": ATTENTION | {"block_types": ["recurrent", "attention"], "lru_width": 32, "head_dim": 8},
}
BROKEN = {"MiniMax": ATTENTION | EXPERTS | HYBRID | {"block_size": 8}}  # ignores padding, but not when it generates
WITHOUT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "local_rollout_forward_batch_size": 1}


def family(name: str) -> Any:
    common = {
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**common | (SOUND | LEAKY | BROKEN)[name])
    return transformers.AutoModelForCausalLM.from_config(config)


def trained(folder: Any, name: str, caplog: Any, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    """The records of two updates of a full model, every one of them a good one, and what was said."""
    common = {"max_steps": 2, "trust_max_kl": 0.01, "learning_rate": 1e-2}
    trainer = tiny.trainer(folder, family(name), peft_config=None, changes=common | changes)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = load_records(folder)
    assert all(record["refused"] is None and 0 < record["trust"]["kl"] <= 0.01 for record in found)
    return found, caplog.text


@on_pinned_transformers("In older ones more families mind it, and are named as well.")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", [*SOUND, *LEAKY, *BROKEN])
def test_who_minds_the_padding_is_found_by_trying(name, dtype, caplog):
    SplitLM(family(name).to(dtype), name="policy")
    assert (f"policy: {name}ForCausalLM does not ignore padding" in caplog.text) == (name in LEAKY)


@pytest.mark.parametrize("name", SOUND)
def test_a_memory_that_ignores_padding_is_generated_from_as_it_is_trained(name, tmp_path, caplog):
    found, said = trained(tmp_path, name, caplog)
    assert all(abs(record["sampler"]["kl"]) < 1e-8 for record in found) and "sampler/kl" not in said


@pytest.mark.parametrize("name", [*LEAKY, *BROKEN])
def test_padding_in_the_memory_leaves_the_ratio_at_1_and_the_limit_held(name, tmp_path):
    """What is measured is the policy as it is trained, padding and all."""
    trainer = tiny.trainer(tmp_path, family(name), peft_config=None, changes={"trust_max_kl": 1e-3})
    batch = before_the_first_step(trainer)
    trainer.optimise(batch)
    assert 0 < trainer.enforce(batch, trainer.measure(batch)).kl <= 1e-3


@pytest.mark.parametrize("name", ["Rwkv", *BROKEN])
def test_a_sampler_that_is_not_the_policy_is_told_once_and_is_mended_as_it_says(name, tmp_path, caplog):
    found, said = trained(tmp_path / "padded", name, caplog)
    assert all(record["sampler"]["kl"] > 0.05 for record in found)
    assert said.count("says other things when it generates") == 1 and "local_rollout_forward_batch_size=1" in said
    caplog.clear()
    found, said = trained(tmp_path / "alone", name, caplog, **WITHOUT)
    assert all(abs(record["sampler"]["kl"]) < 1e-8 for record in found) and "sampler/kl" not in said
