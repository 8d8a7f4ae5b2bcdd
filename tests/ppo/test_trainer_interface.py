"""The trainer's constructor, in the order of TRL's arguments, and a subclass that overrides a phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, LlamaForCausalLM, TrainerCallback
from trl import LogCompletionsCallback
from trl.models.utils import unwrap_model_for_generation

from tests import tiny
from tests.watched import Watched
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.policy.value_head import ValueHead, ValueModel
from trl_trustkl.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")


class CountsSteps(TrainerCallback):
    count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def test_the_constructor_of_trl_works_by_position(tmp_path):
    policy = tiny.llama()
    trainer = Watched(
        tiny.config(tmp_path),
        tiny.tokenizer(),
        policy,
        tiny.llama(),
        tiny.scalar_model(policy, seed=2),
        tiny.id_prompts(),
        tiny.scalar_model(policy, seed=1),
        None,
        tiny.id_prompts(),
        (None, None),
        [steps := CountsSteps()],
        tiny.lora(),
    )
    trainer.train()
    assert steps.count == 3 and len(load_records(tmp_path)) == 3
    assert isinstance(trainer.model.value, ValueModel) and trainer.reference.model is not None
    assert trainer.reward_weights == [1.0] and set(trainer.evaluate()) >= {"eval_score", "eval_kl"}


def test_an_override_of_enforce_need_not_call_the_method_it_overrides(tmp_path):
    class Unenforced(TrustKLPPOTrainer):
        def enforce(self, batch: Batch, proposed: Any) -> Any:
            return proposed

    tiny.trainer(tmp_path, kind=Unenforced, changes={"max_steps": 1, "trust_max_kl": 1e-9}).train()
    (record,) = load_records(tmp_path)
    assert record["trust"]["kl"] == record["trust"]["kl_proposed"] > 1e-9
    assert record["trust"]["scale"] is record["trust"]["limit"] is record["trust"]["guaranteed"] is None


# -- TRL's names and helpers -------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 4, 5]])


def test_the_names_of_trl_1_12(tmp_path):
    full = {
        "peft_config": None,
        "value_model": tiny.scalar_model(tiny.llama()),
        "reward_funcs": tiny.scalar_model(tiny.llama()),
    }
    trainer = tiny.trainer(tmp_path, **full)
    assert trainer.policy_model is trainer.model.policy and trainer.value_model is trainer.model.value_model
    assert trainer.value_model is full["value_model"] and trainer.reward_model is full["reward_funcs"]
    assert isinstance(trainer.ref_model, LlamaForCausalLM) and trainer.ref_model is not trainer.policy_model
    first = next(iter(trainer.dataloader))
    assert first["input_ids"].shape == first["attention_mask"].shape and len(first["input_ids"]) == 8
    adapter = tiny.trainer(tmp_path)
    assert adapter.ref_model is None and adapter.reward_model is None
    assert isinstance(adapter.value_model, ValueHead) and adapter.value_model is adapter.model.value


def test_the_reference_context_turns_the_adapter_off(tmp_path):
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 1, "learning_rate": 0.1})
    before = trainer.policy_model(IDS).logits
    trainer.train()
    after = trainer.policy_model(IDS).logits
    with trainer.null_ref_context():
        assert torch.equal(trainer.policy_model(IDS).logits, before)
    assert torch.equal(trainer.policy_model(IDS).logits, after) and not torch.equal(after, before)


def test_the_model_generates_is_saved_and_merged_as_the_policy(tmp_path, capsys):
    trainer = tiny.trainer(tmp_path / "run", changes={"max_steps": 1, "learning_rate": 0.1})
    trainer.train()
    model, greedy = trainer.model, {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.policy.generate(IDS, **greedy)
    assert torch.equal(model.generate(IDS, **greedy), expected) and model.device == torch.device("cpu")
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    with unwrap_model_for_generation(model, trainer.accelerator) as unwrapped:
        assert torch.equal(unwrapped.generate(IDS, **greedy), expected)
    model.policy.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    logits = model.policy(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_that_of_the_policy(tmp_path):
    model = tiny.trainer(tmp_path).model
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.policy.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.policy.is_gradient_checkpointing


def test_trls_callback_for_completions_and_early_stopping(tmp_path, monkeypatch):
    changes = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    changes |= {"metric_for_best_model": "eval_score", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = tiny.trainer(tmp_path, changes=changes, eval_dataset=tiny.prompts(4))
    completions = LogCompletionsCallback(trainer, num_prompts=2, freq=1)
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"eval_score": 1.0})
    trainer.add_callback(completions)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    evaluated = trainer.evaluate

    def evaluate(*arguments: Any, **keywords: Any) -> dict[str, float]:
        metrics = evaluated(*arguments, **keywords)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    assert trainer.state.global_step == 2, "the score did not rise, and early stopping was ignored"
