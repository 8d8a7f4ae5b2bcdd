"""Models that cannot work as what they are passed as are errors at construction, which are right about the fix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

from tests import tiny
from tests.watched import run
from trl_trustkl.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
SMALL |= {"max_position_embeddings": 64}
ENCODERS = {
    "bert": (BertForSequenceClassification, BertConfig),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig),
}


def encoder(kind: str, labels: int = 1) -> PreTrainedModel:
    model, config = ENCODERS[kind]
    special = (
        {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2} if kind == "modernbert" else {}
    )
    return model(config(vocab_size=tiny.VOCAB, num_labels=labels, **SMALL, **special))


def classifier(labels: int = 1) -> LlamaForSequenceClassification:
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = labels
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ["reward_funcs", "reward_model"])
def test_an_encoder_as_a_reward_needs_a_tokenizer_and_works_with_it(tmp_path, kind, name):
    with pytest.raises(
        ConfigError, match=r"`reward_processing_classes` got None for a .*give the model's own tokenizer"
    ):
        tiny.trainer(tmp_path, **{"reward_funcs": None, name: encoder(kind)})
    reads = {"reward_funcs": None, name: encoder(kind), "reward_processing_classes": tiny.tokenizer()}
    _, records = run(tmp_path, changes={"max_steps": 1}, **reads)
    assert records[0]["score"] is not None


@pytest.mark.parametrize(
    ("make", "error", "pieces"),
    [
        (lambda: nn.Linear(2, 2), ConfigError, "got a Linear, which is a module of torch .* give a function"),
        (tiny.llama, ConfigError, "got a LlamaForCausalLM, which generates text and gives no score"),
        (lambda: classifier(2), ConfigError, "LlamaForSequenceClassification with 2 labels; a reward model has 1"),
        (lambda: encoder("bert", 2), ConfigError, "BertForSequenceClassification with 2 labels"),
    ],
)
@pytest.mark.parametrize("tokenizer", [None, tiny.tokenizer()], ids=["ids", "text"])
def test_a_reward_model_that_gives_no_single_score_is_an_error(tmp_path, make, error, pieces, tokenizer):
    with pytest.raises(error, match=pieces):
        tiny.trainer(tmp_path, reward_funcs=[tiny.good_words, make()], reward_processing_classes=[None, tokenizer])


@pytest.mark.parametrize("peft", [False, True])
def test_a_value_model_with_two_labels_is_an_error(tmp_path, peft):
    value: Any = classifier(2)
    if peft:
        value = get_peft_model(value, tiny.lora(task_type="SEQ_CLS"))
    with pytest.raises(ModelError, match="`value_model` has 2 labels; it must have 1"):
        tiny.trainer(tmp_path, value_model=value)


@pytest.mark.parametrize("name", ["reward_funcs", "value_model"])
def test_a_saved_model_with_two_labels_is_an_error(tmp_path, name):
    classifier(2).save_pretrained(tmp_path / "two")
    tiny.tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="two' cannot be loaded as a sequence classifier with one label"):
        tiny.trainer(tmp_path / "run", **{name: str(tmp_path / "two")})


def test_a_model_that_shares_weights_with_a_trained_one_is_an_error(tmp_path):
    reward, policy = classifier(), tiny.llama()
    shares = classifier()
    shares.model = policy.model
    wrapped = get_peft_model(reward, tiny.lora(task_type="SEQ_CLS"))
    for arguments, one, other in [
        ({"value_model": reward, "reward_funcs": reward}, "value_model", r"reward_funcs\[0\]"),
        ({"value_model": reward, "reward_funcs": None, "reward_model": reward}, "value_model", r"reward_funcs\[0\]"),
        ({"value_model": wrapped, "reward_funcs": [tiny.good_words, reward]}, "value_model", r"reward_funcs\[1\]"),
        ({"model": policy, "reward_funcs": shares}, "model", r"reward_funcs\[0\]"),
        ({"model": policy, "value_model": shares}, "model", "value_model"),
    ]:
        with pytest.raises(ModelError, match=f"`{other}` shares weights with `{one}`, which is trained"):
            tiny.trainer(tmp_path, **arguments)
    assert all(weight.requires_grad for weight in policy.parameters()), "the check changed a model"


def test_a_reference_that_shares_trained_weights_is_an_error_and_frozen_ones_may_be_shared(tmp_path):
    base = tiny.llama()
    policy = get_peft_model(base, tiny.lora())
    with pytest.raises(ModelError, match="`ref_model` shares weights with `model` that are trained"):
        tiny.trainer(tmp_path, model=policy, peft_config=None, ref_model=base)
    policy, reference = tiny.llama(), tiny.llama(seed=1)
    reference.model.embed_tokens = policy.model.embed_tokens.requires_grad_(False)
    trainer = tiny.trainer(tmp_path, model=policy, peft_config=None, ref_model=reference)
    assert trainer.ref_model is reference


def test_a_copy_of_the_reward_model_is_a_value_model(tmp_path):
    reward = classifier()
    _, records = run(
        tmp_path, changes={"max_steps": 1}, value_model=copy.deepcopy(reward), reward_funcs=[reward, reward]
    )
    assert records[0]["rewards"].keys() == {"LlamaForSequenceClassification", "LlamaForSequenceClassification_2"}
