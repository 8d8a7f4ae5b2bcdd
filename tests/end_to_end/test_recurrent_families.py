"""Architectures with recurrent layers: those that ignore padding, and those that do not, for which a warning is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests import families, tiny
from tests.pinned import on_pinned_transformers
from tests.watched import before_the_first_step
from trl_trustkl import load_records
from trl_trustkl.policy.split_lm import SplitLM

pytestmark = pytest.mark.filterwarnings("ignore")
LEAKY = ("Rwkv", "RecurrentGemma")
"""Those that do not ignore padding."""
BROKEN = ("MiniMax",)
"""Those that ignore padding in training and not in generation."""
SOUND = [name for name in families.RECURRENT if name not in LEAKY + BROKEN]
WITHOUT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "local_rollout_forward_batch_size": 1}


def trained(folder: Any, name: str, caplog: Any, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    """Train a full model for two updates, neither of which may be rejected; returns their records and the log."""
    common = {"max_steps": 2, "trust_max_kl": 0.01, "learning_rate": 1e-2}
    trainer = tiny.trainer(folder, families.build(name), peft_config=None, changes=common | changes)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = load_records(folder)
    assert all(record["refused"] is None and 0 < record["trust"]["kl"] <= 0.01 for record in found)
    return found, caplog.text


@on_pinned_transformers("In older versions more families do not ignore padding, and are named too.")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", [*SOUND, *LEAKY, *BROKEN])
def test_a_warning_names_the_families_that_do_not_ignore_padding(name, dtype, caplog):
    SplitLM(families.build(name).to(dtype), name="policy")
    assert (f"policy: {name}ForCausalLM does not ignore padding" in caplog.text) == (name in LEAKY)


@pytest.mark.parametrize("name", SOUND)
def test_a_recurrent_family_that_ignores_padding_samples_from_the_policy_that_is_trained(name, tmp_path, caplog):
    found, said = trained(tmp_path, name, caplog)
    assert all(abs(record["sampler"]["kl"]) < 1e-8 for record in found) and "sampler/kl" not in said


@pytest.mark.parametrize("name", [*LEAKY, *BROKEN])
def test_padding_in_a_recurrent_state_leaves_the_ratio_at_1_and_the_limit_in_force(name, tmp_path):
    """The measurement describes the policy as it is trained, with padding in its recurrent state."""
    trainer = tiny.trainer(tmp_path, families.build(name), peft_config=None, changes={"trust_max_kl": 1e-3})
    batch = before_the_first_step(trainer)
    trainer.optimise(batch)
    assert 0 < trainer.enforce(batch, trainer.measure(batch)).kl <= 1e-3


@pytest.mark.parametrize("name", ["Rwkv", *BROKEN])
def test_a_sampler_that_differs_from_the_policy_is_reported_once_and_the_advice_fixes_it(name, tmp_path, caplog):
    found, said = trained(tmp_path / "padded", name, caplog)
    assert all(record["sampler"]["kl"] > 0.05 for record in found)
    assert (
        said.count("the distribution that `model` samples from differs") == 1
        and "local_rollout_forward_batch_size=1" in said
    )
    caplog.clear()
    found, said = trained(tmp_path / "alone", name, caplog, **WITHOUT)
    assert all(abs(record["sampler"]["kl"]) < 1e-8 for record in found) and "sampler/kl" not in said
