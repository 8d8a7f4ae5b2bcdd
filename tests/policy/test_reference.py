"""The reference policy: a separate model, a frozen adapter, or the policy without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, PeftConfig, get_peft_model

from tests import tiny
from tests.watched import run, watched
from tests.weights import same, trained_weights
from trl_trustkl import load_records
from trl_trustkl.errors import ModelError
from trl_trustkl.policy import loading
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.reference import REFERENCE_ADAPTER

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_model_that_comes_with_an_adapter_starts_at_a_frozen_clone_of_it(tmp_path):
    model = tiny.tuned(lora_dropout=0.3)  # from the earlier tuning; neither policy nor reference keeps it
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".default." in name}
    trainer, records = run(tmp_path, model, peft_config=None, changes={"learning_rate": 1e-2})
    clone, policy = (
        {n.replace(f".{adapter}.", ".default."): p for n, p in model.named_parameters() if f".{adapter}." in n}
        for adapter in (REFERENCE_ADAPTER, "default")
    )
    assert records[0]["anchor"]["kl_exact"] == records[0]["anchor"]["kl"] == 0.0
    assert records[2]["anchor"]["kl_exact"] > 0.0
    assert same(clone, start) and not any(p.requires_grad for p in clone.values())
    assert not same(policy, start) and all(p.requires_grad for p in policy.values())
    assert trainer.model.policy.active_adapter == "default"


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": tiny.lora,
    "LoRA of embeddings": lambda: tiny.lora(target_modules=["embed_tokens", "q_proj"]),
    "DoRA, the head in full": lambda: tiny.lora(
        target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]
    ),
    "token deltas": lambda: tiny.lora(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_clone_that_is_the_reference_is_complete_whatever_the_adapter(tmp_path, kind):
    model = get_peft_model(tiny.llama(), ADAPTERS[kind]())
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _, records = run(tmp_path, model, peft_config=None, changes={"max_steps": 2, "learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] == 0.0 < records[1]["anchor"]["kl_exact"]
    clone = {name: p for name, p in model.named_parameters() if REFERENCE_ADAPTER in name.split(".")}
    assert {name.replace(REFERENCE_ADAPTER, "default") for name in clone} == trained
    assert not any(p.requires_grad or p.grad is not None for p in clone.values())


def test_a_named_reference_adapter_is_used_frozen(tmp_path):
    model = tiny.tuned()
    model.add_adapter("sft", tiny.lora())
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".sft." in name}
    _, records = run(tmp_path, model, peft_config=None, changes={"ref_adapter_name": "sft", "learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] > 0.1  # "sft" has PEFT's initial weights and equals the plain model
    after = {name: weight for name, weight in model.named_parameters() if ".sft." in name}
    assert same(start, after) and not any(weight.requires_grad for weight in after.values())


def test_an_error_in_the_references_pass_leaves_the_policy_active(tmp_path):
    model = tiny.tuned()
    trainer = watched(tmp_path, model, peft_config=None)
    with pytest.raises(RuntimeError, match="out of memory"), trainer.reference.active():
        assert model.active_adapter == REFERENCE_ADAPTER
        raise RuntimeError("out of memory")
    assert model.active_adapter == "default"
    assert all(p.requires_grad == (".default." in n) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_reference_of_a_new_adapter_is_the_model_without_it(tmp_path, family):
    model = tiny.FAMILIES[family]()
    plain = copy.deepcopy(model).eval()
    trainer, records = run(tmp_path, model, changes={"learning_rate": 1e-2, "temperature": 0.7})
    scored, rollout = trainer.seen["score"][2], trainer.seen["rollout"][2]
    assert records[2]["anchor"]["kl_exact"] > 0
    for i in range(8):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        with torch.no_grad():
            logits = plain(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, response.unsqueeze(-1))[:, 0]
        torch.testing.assert_close(scored.ref_logp[i, : len(response)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_fine_tuning_moves_the_model_and_not_the_reference(tmp_path, family):
    model = tiny.FAMILIES[family]()
    before = trained_weights(model)
    trainer, records = run(tmp_path, model, peft_config=None, changes={"learning_rate": 1e-3})
    assert records[0]["anchor"]["kl_exact"] == 0.0 and records[2]["anchor"]["kl_exact"] > 0.0
    assert not same(before, trained_weights(model))
    assert same(before, dict(trainer.reference.model.named_parameters()))


def test_a_separate_reference_model_is_used_and_does_not_change(tmp_path):
    reference = tiny.llama(seed=7)
    before = trained_weights(reference)
    _, records = run(tmp_path, ref_model=reference, changes={"learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] > 0.1
    assert same(before, dict(reference.named_parameters())) and not loading.trainable(reference)


def test_a_second_trainer_of_a_model_starts_at_the_model_as_it_is(tmp_path):
    model = tiny.tuned()
    for name in ("first", "second"):
        trainer = tiny.trainer(tmp_path / name, model, changes={"learning_rate": 0.1}, peft_config=None)
        trainer.train()
        kls = [record["anchor"]["kl_exact"] for record in load_records(tmp_path / name)]
        assert kls[0] == pytest.approx(0, abs=1e-6) and kls[-1] > 1e-3
        assert len(model.peft_config) == 2
    with pytest.raises(ModelError, match="already contains the layers of an adapter"):
        tiny.trainer(tmp_path, model.get_base_model())


@pytest.mark.parametrize(
    ("bias", "trained", "warns"), [("none", "norm.weight", True), ("none", None, False), ("all", None, False)]
)
def test_weights_beside_the_adapter_that_would_not_be_saved_are_warned_about(tmp_path, caplog, bias, trained, warns):
    model = get_peft_model(tiny.gpt2(), tiny.lora(bias=bias)) if bias != "none" else tiny.adapted()
    for name, weight in model.named_parameters():
        if trained and name.endswith(trained):
            weight.requires_grad_(True)
    tiny.trainer(tmp_path, model, peft_config=None)
    assert ("outside of its adapter" in caplog.text) == warns
