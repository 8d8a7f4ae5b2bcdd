"""Stop tokens, the masks of responses, and samples as padded tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from trl_trustkl.errors import ConfigError, ModelError
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.sampling import ended, is_stop, response_mask, sample, stop_ids
from trl_trustkl.types import Prompts, Rollout, UpdateContext

IDS = torch.tensor([[0, 3, 4], [5, 6, 7]])
PROMPTS = Prompts(IDS, IDS != 0, [{"row": 0}, {"row": 1}], UpdateContext(update=0, training=True, sampling_seed=0))


@pytest.mark.parametrize(
    ("stop_token", "stop_token_id", "text", "expected"),
    [
        (None, None, True, [2, 5, 6]),
        (None, None, False, []),
        ("eos", None, False, [2, 5, 6]),
        ("none", None, True, []),
        (None, 7, True, [7]),
    ],
)
def test_stop_tokens_are_those_configured_or_all_that_are_declared(stop_token, stop_token_id, text, expected):
    model, args = tiny.llama(), SimpleNamespace(stop_token=stop_token, stop_token_id=stop_token_id)
    model.generation_config.eos_token_id = [6, 5]
    assert stop_ids(model, tiny.tokenizer(), args, text=text) == expected


def test_an_undeclared_end_of_sequence_is_no_stop_token():
    model, args = tiny.llama(), SimpleNamespace(stop_token="eos", stop_token_id=None)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tiny.tokenizer(), args, text=True) == [2]
    model.generation_config.eos_token_id = 9
    assert stop_ids(model, SimpleNamespace(eos_token_id=None), args, text=True) == [9]


@pytest.mark.parametrize("token", [-1, tiny.VOCAB])
def test_a_stop_token_outside_of_the_vocabulary_is_an_error(token):
    args = SimpleNamespace(stop_token=None, stop_token_id=token)
    with pytest.raises(ConfigError, match=f"`stop_token_id` got {token}; it must be a token of the model's, 0 to 42"):
        stop_ids(tiny.llama(), tiny.tokenizer(), args, text=True)


def test_a_mask_reaches_to_the_first_stop_token():
    response = torch.tensor([[3, 2, 2, 3], [3, 4, 3, 4], [5, 3, 2, 3], [3, 3, 3, 2]])
    mask = response_mask(is_stop(response, [2, 5]))
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False], [True] * 4]
    assert response_mask(is_stop(response, [])).all()
    rollout = Rollout(response, response > 0, response, mask)
    assert ended(rollout, [2, 5]).tolist() == [True, False, True, True] and not ended(rollout, []).any()


def test_a_rollout_may_say_itself_which_responses_ended():
    said = torch.tensor([True, False])
    rollout = Rollout(IDS, IDS != 0, torch.tensor([[3, 4], [3, 2]]), torch.ones(2, 2, dtype=torch.bool), ended=said)
    assert ended(rollout, [2]) is said


class Answers:
    """An engine that returns the given samples, and keeps the prompts and the seed."""

    def __init__(
        self, *ids: list[int], logps: list[torch.Tensor] | None = None, reasons: list[Any] | None = None
    ) -> None:
        reasons = ["stop"] * len(ids) if reasons is None else reasons
        self.samples = Samples([torch.tensor(row) for row in ids], logps, reasons)

    def generate(self, prompt_ids, seed):
        self.asked = [prompt.tolist() for prompt in prompt_ids], seed
        return self.samples


@pytest.mark.parametrize("logps", [None, [torch.tensor([-1.0, -2.0]), -torch.ones(3)]], ids=["without", "with"])
def test_samples_are_padded_on_the_right_with_a_mask_of_their_tokens(logps):
    found = sample(Answers([7, 2], [8, 9, 2], logps=logps), PROMPTS, seed=11, length=4, pad_token_id=2)
    assert found.response_ids.tolist() == [[7, 2, 2, 2], [8, 9, 2, 2]]
    assert found.response_mask.tolist() == [[True, True, False, False], [True, True, True, False]]
    if logps is None:
        assert found.sampler_logp is None
    else:
        assert found.sampler_logp.tolist() == [[-1, -2, 0, 0], [-1, -1, -1, 0]]
    assert found.prompt_ids is IDS and found.rows is PROMPTS.rows and found.context is PROMPTS.context


def test_an_engine_gets_the_prompts_without_padding():
    engine = Answers([3, 2], [2])
    found = sample(engine, PROMPTS, seed=11, length=3, pad_token_id=0)
    assert engine.asked == ([[3, 4], [5, 6, 7]], 11)
    assert found.response_ids.tolist() == [[3, 2, 0], [2, 0, 0]]


def test_a_response_ended_where_the_engine_says_so():
    """One that a stop string ended has no stop token, and one with a stop token may have been cut."""
    found = sample(Answers([3, 4], [3, 2], reasons=["stop", "length"]), PROMPTS, seed=1, length=2, pad_token_id=0)
    assert ended(found, [2]).tolist() == [True, False]


def test_an_engine_that_returns_too_few_finish_reasons_is_named():
    with pytest.raises(
        ModelError, match="Answers returned 2 responses of up to 2 tokens and 1 finish reasons; it must"
    ):
        sample(Answers([3, 4], [3, 2], reasons=["stop"]), PROMPTS, seed=1, length=2, pad_token_id=0)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (
            [[3, 2]],
            "Answers returned 1 responses of up to 2 tokens and 1 finish reasons; it must return 2, one for each prompt",
        ),
        (
            [[3, 2], [4, 4, 4, 2]],
            "Answers returned 2 responses of up to 4 tokens and .* of at most response_length=3 tokens",
        ),
        ([], "Answers returned 0 responses of up to 0 tokens"),
    ],
)
def test_an_engine_that_returns_too_few_or_too_long_responses_is_named(ids, said):
    with pytest.raises(ModelError, match=said):
        sample(Answers(*ids), PROMPTS, seed=11, length=3, pad_token_id=0)
