"""Sampling in a run: the distribution, its log-probabilities, and the model's generation config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests import tiny
from tests.watched import run
from trl_trustkl.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_processed_sampling_shows_in_the_sampler_and_nowhere_else(tmp_path, family):
    changes = {"learning_rate": 0.0, "max_steps": 1, "generation_kwargs": {"repetition_penalty": 1.5}}
    _, (record,) = run(tmp_path, tiny.FAMILIES[family](), changes=changes)
    assert record["sampler"]["kl"] > 1e-3
    assert record["trust"]["kl"] == 0.0 and record["trust"]["max_ratio"] == 1.0 and record["trust"]["gated"] == 0.0
    assert record["anchor"]["kl"] == record["anchor"]["kl_exact"] == 0.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_plain_sampling_is_the_tempered_policy(tmp_path, temperature):
    trainer, (record,) = run(tmp_path, changes={"temperature": temperature, "max_steps": 1})
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    assert record["sampler"]["kl"] < 1e-9
    torch.testing.assert_close(rollout.sampler_logp, scored.logp, rtol=0, atol=1e-4)


def test_the_models_own_generation_config_is_neither_used_nor_changed(tmp_path):
    model = tiny.llama()
    model.generation_config.update(repetition_penalty=1.7, eos_token_id=2, do_sample=True, top_k=3)
    before = model.generation_config.to_dict()
    trainer, (record, *_) = run(tmp_path, model, peft_config=None, changes={"learning_rate": 0.0, "stop_token": "none"})
    assert record["sampler"]["kl"] < 1e-9 and record["length"] == 6
    assert model.generation_config.to_dict() == before
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["repetition_penalty"], saved["top_k"]) == (2, 1.7, 3)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_prompts_are_generated_from_a_few_at_a_time(tmp_path, size, monkeypatch):
    sizes: list[int] = []
    generate = TransformersEngine._generate

    def counted(self: TransformersEngine, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(TransformersEngine, "_generate", counted)
    _, records = run(tmp_path, changes={"local_rollout_forward_batch_size": size, "max_steps": 1})
    assert sizes == {1: [1] * 8, 3: [3, 3, 2], 64: [8]}[size]
    assert records[0]["trust"]["kl"] > 0
