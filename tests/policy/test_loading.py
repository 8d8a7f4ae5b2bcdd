"""Models loaded by name, prepared for training, and saved."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import families, tiny
from tests.tiny import EOS
from tests.watched import before_the_first_step, run, watched, without_seconds
from tests.weights import same, trained_weights
from trl_trustkl import load_records
from trl_trustkl.errors import ModelError
from trl_trustkl.policy import loading, split_lm
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.reference import REFERENCE_ADAPTER

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_model_by_name_is_loaded_with_its_tokenizer(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.scalar_model(tiny.llama()).save_pretrained(tmp_path / "reward")
    tiny.tokenizer().save_pretrained(tmp_path / "reward")
    trainer, records = run(
        tmp_path / "run",
        str(tmp_path / "model"),
        processing_class=None,
        ref_model=str(tmp_path / "model"),
        reward_funcs=str(tmp_path / "reward"),
        changes={"model_init_kwargs": {"dtype": "float32"}, "max_steps": 1},
    )
    assert records[0]["anchor"]["kl_exact"] == 0.0
    assert (
        type(trainer.processing_class).__name__.endswith("TokenizerFast") or trainer.processing_class.eos_token_id == 2
    )


@pytest.mark.parametrize("given", [{"layers": 1}, {"device_map": [1]}, {"dtype": "float33"}], ids=str)
def test_arguments_that_a_model_cannot_be_loaded_with_are_named(tmp_path, given):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.scalar_model(tiny.llama()).save_pretrained(tmp_path / "value")
    for load, name in ((loading.load_causal_lm, "model"), (loading.load_scalar_model, "value")):
        with pytest.raises(ModelError, match=r"cannot be loaded with `model_init_kwargs` \{.*\}: \w+Error: ") as error:
            load(str(tmp_path / name), given)
        assert repr(str(tmp_path / name)) in str(error.value) and str(given) in str(error.value)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_by_name_is_trained_on_its_base_model(tmp_path, with_tokenizer):
    """As the policy, with the tokenizer of its folder or of its base model, and as the reference."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / ("sft" if with_tokenizer else "base"))
    tiny.tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "sft")
    trainer, records = run(
        tmp_path / "run",
        str(tmp_path / "sft"),
        processing_class=None,
        ref_model=str(tmp_path / "sft"),
        peft_config=None,
        changes={"model_init_kwargs": {"dtype": "float32"}, "max_steps": 1},
    )
    assert (
        records[0]["anchor"]["kl_exact"] == pytest.approx(0.0, abs=1e-9)
        and trainer.processing_class.eos_token_id == EOS
    )
    assert isinstance(trainer.model.policy, PeftModel) and not trainable(trainer.reference.model)
    with pytest.raises(ModelError, match="already has an adapter; leave `peft_config` out"):
        tiny.trainer(tmp_path / "twice", str(tmp_path / "sft"))


def test_an_adapter_by_another_name_is_trained_and_an_unknown_name_is_answered_with_those_that_exist(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.lora(), adapter_name="sft")
    trainer, records = run(tmp_path / "run", model, peft_config=None, changes={"max_steps": 1})
    assert trainer.model.policy.active_adapter == "sft" and records[0]["anchor"]["kl_exact"] == 0.0
    assert trainable(model) and all(".sft." in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ModelError, match=r"`model_adapter_name` got 'stf'; the model's adapters are \['sft'"):
        watched(tmp_path / "unknown", model, peft_config=None, changes={"model_adapter_name": "stf"})


def test_gradient_checkpointing_is_switched_on_and_changes_no_number(tmp_path):
    runs = {}
    for on in (False, True):
        trainer, records = run(tmp_path / str(on), changes={"gradient_checkpointing": on})
        assert trainer.model.policy.get_base_model().is_gradient_checkpointing == on
        runs[on] = without_seconds(records)
    for one, other in zip(runs[False], runs[True], strict=True):
        assert one["score"] == other["score"]
        assert one["trust"]["kl"] == pytest.approx(other["trust"]["kl"], rel=1e-3)


def test_a_quantised_model_is_prepared_for_training(tmp_path):
    """Only the adapter is trained, in float32; norms, embeddings and head keep the dtype they were loaded in."""
    model = tiny.llama().to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    policy = loading.prepare_policy(model, tiny.lora(), tiny.config(tmp_path, gradient_checkpointing=True))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for name, p in policy.named_parameters() if name not in trained} == {torch.bfloat16}
    assert split_lm.checkpointed(policy)


@pytest.mark.parametrize("name", ["Mixtral", "OPT"])
def test_the_noise_of_training_is_off(name, tmp_path):
    model = families.build(name, **families.NOISE[name])
    ids = torch.arange(1, 9)[None]
    assert any(not torch.equal(model.train()(ids).logits, model(ids).logits) for _ in range(9)), (
        "the settings add no noise"
    )
    trainer = tiny.trainer(tmp_path, model, peft_config=None, changes={"max_steps": 1})
    before_the_first_step(trainer)


@pytest.mark.parametrize("came_with_adapter", [False, True])
def test_the_saved_adapter_loads_and_holds_no_reference(tmp_path, came_with_adapter):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, peft_config = (tiny.tuned(base), None) if came_with_adapter else (base, tiny.lora())
    trainer, _ = run(tmp_path / "run", model, peft_config=peft_config, changes={"learning_rate": 1e-2})
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    assert not [path for path in saved.rglob("*") if REFERENCE_ADAPTER in path.name]
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not any("value" in name for name in names)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.policy(input_ids=ids).logits
        one = AutoPeftModelForCausalLM.from_pretrained(str(saved))
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(saved))
        for loaded in (one, other):
            assert list(loaded.peft_config) == ["default"]
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(str(saved)).eos_token_id == EOS


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fully_tuned_model_is_saved_as_a_model(tmp_path, family):
    trainer, _ = run(tmp_path, tiny.FAMILIES[family](), peft_config=None)
    trainer.model_wrapped = nn.Sequential(trainer.model)  # as a wrapper for several processes would
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    assert same(
        trained_weights(loaded), {n: w.to(loaded.dtype) for n, w in trained_weights(trainer.model.policy).items()}
    )


def test_a_pad_token_that_the_model_has_no_embedding_for_is_not_saved_with_it(tmp_path):
    """transformers could not load a model whose pad token is outside of its embedding."""
    tokenizer, model = tiny.tokenizer_with_added_pad(), tiny.llama(pad_token_id=None)
    loading.load_policy(model, tokenizer, tiny.config(tmp_path))
    assert model.config.pad_token_id is None
    wider = tiny.llama(pad_token_id=None, vocab_size=tiny.VOCAB + 1)
    loading.load_policy(wider, tokenizer, tiny.config(tmp_path))
    assert wider.config.pad_token_id == tiny.VOCAB


def test_a_pad_token_that_is_another_token_too_does_not_only_pad():
    assert loading.padding_only(tiny.tokenizer_with_added_pad()) == tiny.VOCAB
    shared = tiny.tokenizer(pad=False)
    assert loading.padding_only(shared) is None
    for token in (shared.eos_token, shared.bos_token, shared.unk_token):
        shared.pad_token = token
        assert loading.padding_only(shared) is None


def test_adapters_that_were_disabled_are_enabled_and_merged_ones_rejected(tmp_path):
    model = tiny.tuned()
    model.base_model.disable_adapter_layers()
    tiny.trainer(tmp_path, model, changes={"max_steps": 1}, peft_config=None).train()
    assert load_records(tmp_path)[0]["trust"]["kl"] > 0
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"unmerge_adapter\(\)"):
        tiny.trainer(tmp_path, model, peft_config=None)


def test_an_adapter_that_fits_no_module_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="`peft_config` does not fit the model: .*nope"):
        tiny.trainer(tmp_path, peft_config=tiny.lora(target_modules=["nope"]))
