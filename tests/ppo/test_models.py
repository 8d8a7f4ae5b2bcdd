"""Arguments of the trainer that are missing, exclude each other, or do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.messages import assert_says
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")


def encoder_decoder() -> Any:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=tiny.VOCAB, **sizes))


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"model": lambda: torch.nn.Linear(2, 2)}, ("`model`", "Linear", "causal language model")),
        ({"model": encoder_decoder}, ("`model`", "T5ForConditionalGeneration", "causal language model")),
        (
            {"model": lambda: tiny.scalar_model(tiny.llama())},
            ("`model`", "SequenceClassification", "AutoModelForCausalLM"),
        ),
        ({"processing_class": None}, ("`processing_class`", "None", "only when `model` is a name")),
        ({"processing_class": 3}, ("`processing_class`", "int", "must be a tokenizer")),
        ({"peft_config": {"r": 4}}, ("`peft_config`", "dict", "LoraConfig")),
        ({"model": tiny.adapted}, ("`peft_config`", "already has an adapter", "merge_and_unload")),
        ({"ref_model": lambda: tiny.llama(vocab_size=50)}, ("`ref_model`", "50", tiny.VOCAB, "same vocabulary")),
        ({"value_model": tiny.llama}, ("`value_model`", "LlamaForCausalLM", "num_labels=1", "None for a value head")),
        (
            {"value_model": lambda: tiny.scalar_model(tiny.llama(vocab_size=20))},
            ("`value_model`", "20 embeddings", f"{tiny.VOCAB} tokens", f"resize_token_embeddings({tiny.VOCAB})"),
        ),
        ({"ref_model": 3}, ("`ref_model`", "int", "causal language model", "None")),
        (
            {"ref_model": lambda: tiny.scalar_model(tiny.llama())},
            ("`ref_model`", "SequenceClassification", "causal language model"),
        ),
        ({"value_model": 3}, ("`value_model`", "int", "sequence classifier", "None for a value head")),
        ({"changes": {"ref_adapter_name": "sft"}}, ("`ref_adapter_name`", "'sft'", "['default']")),
        ({"changes": {"model_init_kwargs": {"dtype": "auto"}}}, ("`model_init_kwargs`", "given by name")),
        ({"train_dataset": None}, ("`train_dataset`", "None", "required")),
    ],
)
def test_models_that_do_not_fit_are_named(tmp_path, arguments, pieces):
    arguments = {key: value() if callable(value) else value for key, value in arguments.items()}
    with pytest.raises((ConfigError, ModelError)) as error:
        tiny.trainer(tmp_path, **arguments)
    assert_says(error, *pieces)


def test_a_reward_model_together_with_reward_functions_is_rejected(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_model=tiny.scalar_model(tiny.llama()))
    assert_says(error, "`reward_model`", "`reward_funcs`", "both", "put the model into `reward_funcs`")


def test_the_model_as_its_own_reference_is_rejected(tmp_path):
    model = tiny.llama()
    with pytest.raises(ModelError) as error:
        tiny.trainer(tmp_path, model, ref_model=model)
    assert_says(error, "`ref_model`", "the model itself", "a copy, or None")


def test_a_configuration_of_another_trainer_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="`args` got TrainingArguments; it must be a TrustKLPPOConfig"):
        TrustKLPPOTrainer(
            args=transformers.TrainingArguments(tmp_path, use_cpu=True),
            model=tiny.llama(),
            processing_class=tiny.tokenizer(),
            reward_funcs=tiny.good_words,
            train_dataset=tiny.prompts(),
        )
