"""Responses that are empty or only padding."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from tests.scripted import EOS, PAD, WORDS, scripted
from tests.weights import same, trained_weights
from trl_trustkl import load_records

pytestmark = pytest.mark.filterwarnings("ignore")

EMPTY = ([], 0)

ALL_PAD = ([PAD] * 6, 6)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "script",
    [[EMPTY, WORDS], [EMPTY], [ALL_PAD], [ALL_PAD, EMPTY, WORDS], [([EOS], 1), ([PAD], 1), WORDS]],
    ids=["some empty", "all empty", "all PAD", "mixed", "one token"],
)
def test_empty_and_all_pad_responses_leave_a_run_finite(tmp_path, script, peft):
    trainer = scripted(
        tmp_path,
        script,
        reward_funcs=lambda prompts, completions: [float(i) for i in range(len(prompts))],
        peft_config=tiny.lora() if peft else None,
        changes={"max_steps": 2},
    )
    before = trained_weights(trainer.model)
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    for record in load_records(tmp_path):
        assert record["refused"] is None
        assert all(math.isfinite(record["trust"][key]) for key in ("kl", "kl_max", "max_ratio"))
        assert record["length"] == sum(script[i % len(script)][1] for i in range(8)) / 8
    # An empty response has no token: if all responses are empty, the weights do not change.
    assert same(before, trained_weights(trainer.model)) == (script == [EMPTY])
    assert trainer.scored.scores.isnan().tolist() == [script[i % len(script)] == EMPTY for i in range(8)]


@pytest.mark.parametrize("token", [PAD, EOS], ids=["PAD", "EOS"])
def test_a_model_that_only_generates_pad_or_eos_continues_training(tmp_path, token):
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits; the hook below adds a bias
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + 1e3 * torch.eye(tiny.VOCAB)[token])
    trainer = tiny.trainer(tmp_path, model, changes={"max_steps": 2}, peft_config=tiny.lora(target_modules=["q_proj"]))
    trainer.train()
    for record in load_records(tmp_path):
        assert record["refused"] is None
        assert record["length"] == (6 if token == PAD else 1)  # a sampled PAD is a token like any other
        assert record["eos_rate"] == (0 if token == PAD else 1)
        assert record["entropy"] == 0 and record["trust"]["max_ratio"] == 1
