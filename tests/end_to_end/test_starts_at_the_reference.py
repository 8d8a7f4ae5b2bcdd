"""The reference is the model that was passed, whatever kind of adapter is trained, and stays it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, FourierFTConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from tests import tiny
from tests.dense import dense_kl, rollout_logps
from tests.watched import watched
from trl_trustkl import load_records
from trl_trustkl.errors import ModelError
from trl_trustkl.policy import loading
from trl_trustkl.policy.loading import trainable

pytestmark = pytest.mark.filterwarnings("ignore")


def with_biases(seed: int = 0) -> LlamaForCausalLM:
    model = tiny.llama(seed, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


def saved_adapter(folder: Path) -> Path:
    """The folder of an adapter that was tuned on a saved base model."""
    tiny.llama().save_pretrained(folder / "base")
    tiny.tuned(LlamaForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "sft")
    return folder / "sft"


class Start:
    """How a run starts: the `model` and the `peft_config` that the trainer gets, and the model that π_ref has to be."""

    def __init__(self, model: Any, passed: nn.Module, peft_config: Any = None) -> None:
        self.model, self.passed, self.peft_config = model, passed, peft_config


def new(model: nn.Module, **changes: Any) -> Start:
    return Start(model, copy.deepcopy(model), tiny.lora(**changes))


def sft_object(folder: Path) -> Start:
    model = tiny.tuned()
    return Start(model, copy.deepcopy(model))


def sft_folder(folder: Path) -> Start:
    path = saved_adapter(folder)
    return Start(str(path), AutoPeftModelForCausalLM.from_pretrained(path))


def sft_pissa(folder: Path) -> Start:
    model = get_peft_model(tiny.llama(), tiny.lora(init_lora_weights="pissa"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return Start(model, copy.deepcopy(model))


def four_bit(folder: Path) -> Start:
    return Start(tiny.four_bit(folder), tiny.four_bit(folder), tiny.lora())


STARTS: dict[str, Callable[[Path], Start]] = {
    "LoRA": lambda folder: new(tiny.llama()),
    "PiSSA": lambda folder: new(tiny.llama(), init_lora_weights="pissa"),
    "OLoRA": lambda folder: new(tiny.llama(), init_lora_weights="olora"),
    "DoRA": lambda folder: new(tiny.llama(), use_dora=True),
    "all biases": lambda folder: new(with_biases(), bias="all"),
    "biases of LoRA's layers": lambda folder: new(with_biases(), bias="lora_only", target_modules=["q_proj", "v_proj"]),
    "PiSSA, all biases": lambda folder: new(with_biases(), init_lora_weights="pissa", bias="all"),
    "an adapter": sft_object,
    "the folder of an adapter": sft_folder,
    "an adapter that began with PiSSA": sft_pissa,
    "full": lambda folder: Start(model := tiny.llama(), copy.deepcopy(model)),
    "4 bits": four_bit,
}


@pytest.mark.parametrize("kind", STARTS)
def test_the_kl_starts_at_0_and_is_that_to_the_model_that_was_passed(tmp_path, kind):
    start = STARTS[kind](tmp_path)
    changes = {"learning_rate": 1e-2, "max_steps": 4, "kl_estimator": "exact", "kl_placement": "both"}
    trainer = watched(tmp_path / "run", start.model, changes=changes, peft_config=start.peft_config)
    trainer.train()
    assert load_records(tmp_path / "run")[0]["anchor"]["kl_exact"] == pytest.approx(0.0, abs=1e-9)

    rollout = trainer.rollout(trainer.next_prompts())
    mask = rollout.response_mask
    found = trainer.score(rollout).ref_kl[mask].double()
    policy, passed = (
        rollout_logps(model.train(), rollout, 1.0)
        for model in (trainer.model.policy, start.passed.requires_grad_(False))
    )
    expected = dense_kl(policy, passed)
    assert expected.mean() > 1e-3, "the policy did not move"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


ADAPTERS: dict[str, tuple[PeftConfig, str]] = {
    "LoRA": (
        tiny.lora(init_lora_weights=False),
        r"is a LoraConfig .* \(init_lora_weights=False\): .*`ref_model`",
    ),
    "FourierFT": (
        FourierFTConfig(target_modules=["q_proj"], n_frequency=10, scaling=50.0, task_type="CAUSAL_LM"),
        r"is a FourierFTConfig .* \(init_weights=False\)",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_changes_the_model_is_an_error_without_a_reference(tmp_path, kind):
    config, said = ADAPTERS[kind]
    with pytest.raises(ModelError, match=said):
        tiny.trainer(tmp_path, peft_config=config)
    tiny.trainer(tmp_path, peft_config=config, ref_model=tiny.llama()).train()
    assert load_records(tmp_path)[0]["anchor"]["kl_exact"] > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_model_that_cannot_be_recovered_is_an_error(tmp_path, monkeypatch, dtype):
    """As LoftQ's, or PiSSA's in bf16, which round it: neither with the adapter nor without it is the policy the model."""

    def rounded(model: Any, config: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 4).round() / 4)
        return get_peft_model(model, config)

    monkeypatch.setattr(loading, "get_peft_model", rounded)
    with pytest.raises(
        ModelError, match="is a LoraConfig whose new adapter changes the model before the first"
    ) as error:
        tiny.trainer(tmp_path, tiny.llama().to(dtype))
    assert ("load it in float32" in str(error.value)) == (dtype is torch.bfloat16)


def test_a_policy_that_is_changed_before_the_first_step_is_an_error(tmp_path):
    trainer = tiny.trainer(tmp_path)
    with torch.no_grad():
        for parameter in trainable(trainer.model.policy):
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(ModelError, match="before the first step the KL to the reference is .* it must be 0"):
        trainer.train()


def test_a_second_run_of_a_trainer_starts_where_the_first_ended(tmp_path):
    trainer = tiny.trainer(tmp_path, changes={"learning_rate": 2e-2})
    trainer.train()
    trainer.train()
    assert load_records(tmp_path)[0]["anchor"]["kl_exact"] > 0.01


class Masked(LlamaForCausalLM):
    """A model that never says a tenth of its vocabulary: the logits of these tokens are −inf."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        excluded = torch.arange(out.logits.shape[-1]) % 10 == 9
        return type(out)(**{**out, "logits": out.logits.masked_fill(excluded, -torch.inf)})


def test_logits_of_minus_infinity_are_part_of_the_distribution(tmp_path, caplog):
    """Of the policy's and of the reference's: divergences and entropy are those over the tokens that can be sampled."""
    torch.manual_seed(0)
    model = Masked(tiny.llama().config)
    changes = {
        "learning_rate": 1e-2, "kl_estimator": "exact", "kl_placement": "both", "kl_coef": 0.3, "trust_coef": 0.3,
        "trust_max_kl": 0.05,
    }  # fmt: skip
    passed = copy.deepcopy(model)
    trainer = watched(tmp_path, model, changes=changes)
    assert "differ from output_head(hidden_states)" in caplog.text
    trainer.train()
    records = load_records(tmp_path)
    assert [record["refused"] for record in records] == [None] * 3 and all(r["trust"]["kl"] <= 0.05 for r in records)
    rollout = trainer.rollout(trainer.next_prompts())
    scored, mask = trainer.score(rollout), rollout.response_mask
    policy, reference = (rollout_logps(each.train(), rollout, 1.0) for each in (trainer.model.policy, passed))
    terms = torch.where(policy.isneginf(), 0.0, policy.exp() * (policy - reference))
    torch.testing.assert_close(scored.ref_kl[mask].double(), terms.sum(-1), rtol=1e-4, atol=1e-5)
    entropy = -torch.where(policy.isneginf(), 0.0, policy.exp() * policy).sum(-1)
    torch.testing.assert_close(scored.entropy[mask].double(), entropy, rtol=1e-5, atol=1e-5)
    assert policy.isneginf().any() and terms.sum(-1).mean() > 1e-3
