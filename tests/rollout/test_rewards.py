"""Single calls of reward functions and reward models, and their checks."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from trl_trustkl.errors import ConfigError, NonFiniteRewardError, RewardError
from trl_trustkl.rollout.rewards import (
    RewardModel,
    as_completion,
    as_text,
    build_rewards,
    reward_name,
    rewards_of,
    token_readers,
)
from trl_trustkl.types import Rollout

CHAT = [{"role": "user", "content": "w1"}]
ANSWER = [{"role": "assistant", "content": "w2"}]


def rollout() -> Rollout:
    ids = torch.tensor([[0, 3], [4, 5], [6, 7]])
    mask = torch.tensor([[False, True], [True, True], [True, True]])
    response_mask = torch.tensor([[True, True], [True, False], [True, True]])
    return Rollout(ids, mask, ids + 6, response_mask)


def rewards(function: Any, **keywords: Any) -> list[float | None]:
    return rewards_of(function, rollout(), ["p", "q", "r"], ["a", "b c", "d"], keywords, batch_size=2)


def returning(value: Any) -> Any:
    def function(completions: list[str], **_: Any) -> Any:
        return value

    return function


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None],
        (True, np.float64(2.5), None),
        iter([1, 2.5, None]),
        [torch.tensor(1.0), np.array(2.5), None],
    ],
)
def test_numbers_of_every_kind_become_floats_and_none_stays(value):
    assert rewards(returning(value)) == [1.0, 2.5, None]


@pytest.mark.parametrize("value", [torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True), np.array([[1], [2], [3]])])
def test_a_column_of_rewards_counts_as_a_list(value):
    assert rewards(returning(value)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ("abc", RewardError, "`function` returned str; it must return a list of 3 values, each a number or None"),
        ({1: 2}, RewardError, "returned dict"),
        (7, RewardError, "returned int"),
        (None, RewardError, "returned NoneType"),
        ([1, 2], RewardError, "returned 2 rewards for 3 completions"),
        (itertools.count(), RewardError, "returned at least 4 rewards for 3 completions"),
        ([1, "2", 3], RewardError, "returned '2' for completion 1; not a number"),
        ([1, [2], 3], RewardError, r"returned \[2\] for completion 1"),
        ([1, np.array([2]), 3], RewardError, "for completion 1; not a number"),
        ([1, 2, math.nan], NonFiniteRewardError, "returned nan for completion 2; a reward must be finite"),
        ([1, -math.inf, 3], NonFiniteRewardError, "returned -inf for completion 1"),
        ([10**400, 2, 3], NonFiniteRewardError, "for completion 0; a reward must be finite"),
        ([1e39, 2, 3], NonFiniteRewardError, r"returned 1e\+39 for completion 0"),
    ],
)
def test_what_is_not_a_list_of_numbers_is_named(value, error, said):
    with pytest.raises(error, match=said):
        rewards(returning(value))


def test_an_async_function_is_waited_for_within_a_running_loop_too():
    async def function(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def notebook() -> list[float | None]:
        return rewards(function)

    assert rewards(function) == asyncio.run(notebook()) == [1.0, 3.0, 1.0]


def test_a_function_gets_copies_and_only_the_keywords_that_it_takes():
    given = {"wanted": [[1], [2], [3]], "other": [4, 5, 6], "completion_ids": [[1], [2], [3]]}

    def function(prompts, completions, wanted, completion_ids):
        for argument in (prompts, completions, wanted):
            argument.clear()
        completion_ids[0].append(9)
        torch.set_grad_enabled(False)
        return [0.0] * 3

    prompts, completions = ["p", "q", "r"], ["a", "b", "c"]
    rewards_of(function, rollout(), prompts, completions, given, batch_size=2)
    assert prompts == ["p", "q", "r"] and completions == ["a", "b", "c"]
    assert given["wanted"] == [[1], [2], [3]] and given["completion_ids"][0] == [1]
    assert torch.is_grad_enabled()


def test_an_error_of_a_function_is_named_and_kept():
    def fails(**_: Any) -> None:
        raise KeyError("x")

    with pytest.raises(RewardError, match="reward function `fails` raised KeyError: 'x'") as error:
        rewards(fails)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_reward_model_reads_text_or_the_last_token_of_prompt_and_response():
    model, tokenizer = tiny.scalar_model(tiny.llama()), tiny.tokenizer()
    by_ids = rewards_of(RewardModel(model, None), rollout(), ["p"] * 3, ["a"] * 3, {}, batch_size=2)
    given = rollout()
    for row, reward in enumerate(by_ids):
        ids = torch.cat(
            [given.prompt_ids[row][given.prompt_mask[row]], given.response_ids[row][given.response_mask[row]]]
        )
        assert reward == pytest.approx(float(model(input_ids=ids[None]).logits), abs=1e-5)
    by_text = rewards_of(RewardModel(model, tokenizer), given, ["w1 "] * 3, ["w2", "w3 w4", "w5"], {}, batch_size=2)
    texts = ["w1 w2", "w1 w3 w4", "w1 w5"]
    expected = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert by_text == pytest.approx(expected, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_token_that_a_reward_model_does_not_know_is_named_unless_it_only_pads():
    model = tiny.scalar_model(tiny.llama(vocab_size=10))
    with pytest.raises(RewardError, match="the token 10, and the vocabulary of the reward model .* is 0 to 9"):
        rewards(RewardModel(model, None))
    model = tiny.scalar_model(tiny.llama(vocab_size=13))
    expected = model(input_ids=torch.tensor([[6, 7, 12]])).logits.item()  # the last row without its last token, 13
    assert rewards(RewardModel(model, None, padding_id=13))[2] == pytest.approx(expected, abs=1e-5)
    model = tiny.scalar_model(tiny.llama(vocab_size=14))
    expected = model(input_ids=torch.tensor([[6, 7, 12, 13]])).logits.item()
    assert rewards(RewardModel(model, None, padding_id=13))[2] == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_without_an_embedding_of_its_pad_token_reads_texts_one_by_one():
    model, tokenizer = tiny.scalar_model(tiny.llama(pad_token_id=None)), tiny.tokenizer_with_added_pad()
    reward = RewardModel(model, tokenizer)
    found = rewards_of(reward, rollout(), ["w1 "] * 3, ["w2", "w3 w4", "w5"], {}, batch_size=3)
    texts = ["w1 w2", "w1 w3 w4", "w1 w5"]
    expected = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_error_of_a_reward_model_is_named_and_kept():
    model = tiny.scalar_model(tiny.llama())
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(RewardError, match="reward model `LlamaForSequ.*` raised ZeroDivisionError: ") as error:
        rewards_of(RewardModel(model, tiny.tokenizer()), rollout(), ["w1 "] * 3, ["w2"] * 3, {}, batch_size=3)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_tokenizer_without_a_pad_token_does_not_hide_the_end_of_a_text():
    """The template ends each conversation with the token that then pads."""
    model, tokenizer = tiny.scalar_model(tiny.llama()), tiny.tokenizer(pad=False)
    prompts = [CHAT, [{"role": "user", "content": "w1 w3 w4"}]]
    found = RewardModel(model, tokenizer).score_text(prompts, [ANSWER] * 2)
    for score, prompt in zip(found, prompts, strict=True):
        ids = torch.tensor([tokenizer(as_text(prompt, ANSWER, tokenizer), add_special_tokens=False)["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        every = model.score(model.model(ids).last_hidden_state)[0, :, 0]
        assert float(score) == pytest.approx(float(every[-1]), abs=1e-5) != pytest.approx(float(every[-2]), abs=1e-5)


def test_conversations_are_read_through_the_template_or_line_by_line():
    assert as_text("w1 ", "w2", tiny.tokenizer()) == "w1 w2"
    complete = as_text(CHAT, ANSWER, tiny.tokenizer())
    assert " ".join(complete.split()) == "<bos> user w1 <eos> <bos> assistant w2 <eos>"
    assert as_text(CHAT, ANSWER, tiny.tokenizer(chat=False)) == "w1\nw2"
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w3"}]}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert as_text([*parts, *calls], ANSWER, tiny.tokenizer(chat=False)) == "w1 w3\n\nw2"
    assert as_completion("w2", CHAT) == ANSWER and as_completion("w2", "w1") == "w2"


def build(*arguments: Any, weights: Any = None) -> Any:
    return build_rewards(*arguments, weights=weights, init_kwargs=None, vocab_size=tiny.VOCAB)


def test_functions_and_models_are_made_ready_with_their_weights():
    model, function = tiny.scalar_model(tiny.llama()), returning([1.0])
    (first, second), weights = build([function, model], [None, tiny.tokenizer()], weights=[2, 3])
    assert first is function and isinstance(second, RewardModel) and second.model is model and weights == [2, 3]
    assert build(function, None) == ([function], [1.0])
    readers = token_readers([function, RewardModel(model, None), second])
    assert list(readers) == ["reward_funcs[1]"] and readers["reward_funcs[1]"] is model
    assert reward_name(function) == "function" and reward_name(second) == "LlamaForSequenceClassification"


@pytest.mark.parametrize(
    ("functions", "tokenizers", "weights", "said"),
    [
        (None, None, None, "`reward_funcs` got nothing"),
        ([None], None, None, "`reward_funcs` got nothing"),
        ([7], None, None, "`reward_funcs` got 7; each must be a callable"),
        ([len, len], [None], None, "`reward_processing_classes` got 1 for 2 reward functions"),
        ([len, len], None, [1.0], "`reward_weights` got 1 for 2 reward functions"),
    ],
)
def test_lists_that_do_not_match_are_an_error(functions, tokenizers, weights, said):
    with pytest.raises(ConfigError, match=said):
        build(functions, tokenizers, weights=weights)


def test_a_model_that_is_no_reward_model_of_the_policys_tokens_is_an_error():
    two = tiny.scalar_model(tiny.llama())
    two.config.num_labels = 2
    with pytest.raises(ConfigError, match="a LlamaForSequenceClassification with 2 labels"):
        build(two, None)
    with pytest.raises(ConfigError, match="`reward_processing_classes` got None for a reward model with 10 embeddings"):
        build(tiny.scalar_model(tiny.llama(vocab_size=10)), None)
