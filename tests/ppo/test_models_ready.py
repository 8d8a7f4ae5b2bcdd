"""The models and data of a run, made ready before training."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel

from tests import tiny
from tests.tiny import EOS
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.value_head import ValueHead, ValueModel
from trl_trustkl.ppo import models
from trl_trustkl.rollout.rewards import RewardModel

pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(folder: Any, **changes: Any) -> models.Models:
    settings = {
        "model": tiny.llama(), "tokenizer": tiny.tokenizer(), "ref_model": None, "value_model": None,
        "peft_config": tiny.lora(), "reward_model": None, "reward_funcs": tiny.good_words, "reward_processing_classes": None,
        "train": tiny.prompts(), "evaluation": None, "tags": ["ppo"],
    }  # fmt: skip
    args = tiny.config(folder, temperature=0.7, detach_value_head=False, reward_weights=changes.pop("weights", None))
    return models.prepare(args, **settings | changes)


def test_policy_value_and_reference_are_ready(tmp_path):
    ready = prepared(tmp_path)
    assert isinstance(ready.trained.policy, PeftModel) and isinstance(ready.trained.value, ValueHead)
    assert ready.trained.temperature == 0.7 and ready.trained.detach_value is False
    assert ready.reference.model is None and ready.reference.policy is ready.trained.policy
    assert trainable(ready.trained.policy) and trainable(ready.trained.value)
    assert "ppo" in ready.trained.policy.model_tags


def test_separate_models_are_used(tmp_path):
    reference, value, reward = tiny.llama(seed=2), tiny.scalar_model(tiny.llama()), tiny.scalar_model(tiny.llama())
    ready = prepared(
        tmp_path, ref_model=reference, value_model=value, reward_funcs=[reward, tiny.good_words], weights=[2, 3]
    )
    assert ready.reference.model is reference and not trainable(reference)
    assert isinstance(ready.trained.value, ValueModel) and ready.trained.value.model is value
    assert isinstance(ready.reward_funcs[0], RewardModel) and ready.reward_funcs[1] is tiny.good_words
    assert ready.reward_weights == [2, 3]


def test_datasets_get_token_ids_and_text_prompts_a_stop_token(tmp_path):
    ready = prepared(tmp_path, evaluation={"held out": tiny.prompts(3)})
    assert ready.train["input_ids"][0] == tiny.tokenizer()(tiny.prompts()["prompt"][0])["input_ids"]
    assert {"input_ids", "prompt"} <= set(ready.evaluation["held out"].column_names)
    assert ready.stop_ids == [EOS]
    ids: Dataset = tiny.id_prompts()
    assert (
        prepared(tmp_path, train=ids).stop_ids == []
        and prepared(tmp_path, train=ids).train["input_ids"] == ids["input_ids"]
    )
