"""The task of the demo and of the comparisons, with a tiny model in place of SmolLM2."""

from __future__ import annotations

import logging
import warnings

import datasets
import pytest
import torch
import transformers

from tests import tiny
from trl_trustkl.demo import smollm2, task
from trl_trustkl.demo.prompts import EVAL_PROMPTS, TRAIN_PROMPTS
from trl_trustkl.demo.rewards import sentiment
from trl_trustkl.policy import cpu


@pytest.fixture(autouse=True)
def _restored():
    """`quieten` changes settings of the process."""
    level = logging.getLogger("bitsandbytes").level
    bars = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        yield
    logging.getLogger("bitsandbytes").setLevel(level)
    if not bars[0]:
        datasets.enable_progress_bars()
    if bars[1]:
        transformers.utils.logging.enable_progress_bar()


def test_the_configuration_makes_four_steps_of_each_update_and_takes_changes(tmp_path):
    config = task.sentiment_config(str(tmp_path), kl_coef=0.3, max_steps=7)
    config_of_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (config_of_batch, config.num_mini_batches, config.num_ppo_epochs, config.response_length) == (16, 2, 2, 24)
    assert (config.kl_coef, config.max_steps, config.output_dir) == (0.3, 7, str(tmp_path))
    assert config.use_cpu is not torch.cuda.is_available() and config.bf16 is cpu.computes_bf16()
    assert task.sentiment_config(str(tmp_path), response_length=5).response_length == 5


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_trainer_has_the_prompts_the_reward_and_an_adapter(tmp_path, monkeypatch, has, dtype):
    loaded = []

    def load(**options):
        loaded.append(options)
        return tiny.llama(), tiny.tokenizer()

    monkeypatch.setattr(smollm2, "load_smollm2", load)
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: has)
    trainer = task.sentiment_trainer(str(tmp_path), max_steps=2, use_cpu=True)
    assert trainer.args.bf16 is has
    assert loaded == [{"quantize": True, "dtype": dtype}]
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (len(TRAIN_PROMPTS), len(EVAL_PROMPTS))
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": TRAIN_PROMPTS[0]}]
    assert trainer.reward_funcs == [sentiment] and trainer.args.max_steps == 2
    assert trainer.model.policy.peft_config["default"].r == 8


def test_the_trainer_of_grpo_has_the_same_task_and_a_limit(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        smollm2, "load_smollm2", lambda **options: loaded.append(options) or (tiny.llama(), tiny.tokenizer())
    )
    trainer = task.sentiment_grpo_trainer(str(tmp_path), max_steps=2, bf16=False, trust_max_kl=0.01)
    assert loaded == [{"quantize": False, "dtype": torch.float32}]
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (len(TRAIN_PROMPTS), len(EVAL_PROMPTS))
    assert trainer.args.generation_batch_size == 16 and trainer.args.num_generations == 8
    assert trainer.reward_funcs == [sentiment] and trainer.args.trust_max_kl == 0.01
    assert trainer.model.peft_config["default"].r == 8


def test_the_libraries_are_quiet(capsys):
    task.quieten()
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
    assert datasets.are_progress_bars_disabled() and not transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("old", FutureWarning, stacklevel=1)
    assert caught == []
