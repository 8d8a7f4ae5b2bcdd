"""Reward functions and reward models that fail or do not fit."""

from __future__ import annotations

import asyncio
import copy
import math
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError, RefusedError, RewardError

pytestmark = pytest.mark.filterwarnings("ignore")

NAN, INF = math.nan, math.inf


def test_a_text_too_long_for_a_reward_model_with_another_tokenizer_is_named(tmp_path):
    judge = tiny.short_gpt2(transformers.GPT2ForSequenceClassification)
    trainer = tiny.trainer(tmp_path, reward_funcs=judge, reward_processing_classes=tiny.tokenizer())
    with pytest.raises(RewardError) as error:
        trainer.train()
    assert_says(error, "`GPT2ForSequenceClassification`", "more than its context of 8", "lower response_length")


def raises(prompts, completions, **_):
    raise KeyError("no such judge")


async def raises_later(prompts, completions, **_):
    raise KeyError("no such judge")


def rewards(*some: Any):
    """A reward function that returns these for the first completions, and 1.0 for the others."""

    def given(prompts, completions, **_):
        return [*some, *[1.0] * (len(completions) - len(some))]

    return given


def returns(value: Any):
    def given(prompts, completions, **_):
        return value

    return given


@pytest.mark.parametrize(
    ("function", "pieces"),
    [
        (raises, ("`raises`", "raised KeyError", "no such judge")),
        (raises_later, ("`raises_later`", "raised KeyError", "no such judge")),
        (returns([1.0] * 7), ("`given`", "7 rewards", "8 completions")),
        (returns([]), ("`given`", "0 rewards", "8 completions")),
        (returns(1.0), ("`given`", "float", "a list of 8")),
        (returns(None), ("`given`", "NoneType", "a list of 8")),
        (rewards(1.0, "good"), ("`given`", "'good'", "completion 1", "not a number")),
        (rewards(1.0, 0.5, NAN), ("`given`", "nan", "completion 2", "finite", "None to leave the completion out")),
        (rewards(INF), ("`given`", "inf", "completion 0", "finite", "None to leave the completion out")),
        (rewards(1.0, -INF), ("`given`", "-inf", "completion 1", "finite")),
        (rewards(1e39), ("`given`", "1e+39", "completion 0", "finite")),
        (returns(torch.tensor([1.0] * 7 + [NAN])), ("`given`", "nan", "completion 7", "finite")),
    ],
)
def test_a_reward_function_that_fails_is_named_with_what_it_did(tmp_path, function, pieces):
    # A reward that is not finite rejects its update; other failures end the run.
    trainer = tiny.trainer(tmp_path, reward_funcs=function, changes={"max_refused": 1})
    with pytest.raises(RefusedError if "finite" in pieces else RewardError) as error:
        trainer.train()
    assert_says(error, "reward function", *pieces)


@pytest.mark.parametrize("function", [raises, raises_later])
def test_the_error_of_a_reward_function_stays_attached(tmp_path, function):
    with pytest.raises(RewardError) as error:
        tiny.trainer(tmp_path, reward_funcs=function).train()
    assert isinstance(error.value.__cause__, KeyError)


async def gives_up(prompts, completions, **_):
    raise asyncio.CancelledError


def test_an_async_reward_function_that_is_cancelled_has_failed(tmp_path):
    with pytest.raises(RewardError, match="`gives_up` raised CancelledError"):
        tiny.trainer(tmp_path, reward_funcs=gives_up).train()


@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_function_that_changes_its_arguments_affects_nothing_else(tmp_path, chat):
    seen = []

    def vandal(prompts, completions, completion_ids, wanted, trainer_state, **_):
        trainer_state.global_step = 99
        torch.set_grad_enabled(False)
        for messages in (*prompts, *completions) if chat else ():
            messages[0]["content"] = "broken"
        for given in (prompts, completions, completion_ids[0], completion_ids, wanted):
            given.clear()
        return [0.0] * 8

    def watch(prompts, completions, completion_ids, wanted, **_):
        seen.append(str((prompts, completions, completion_ids, wanted)))
        return tiny.good_words(prompts, completions)

    for name, functions in (("alone", [watch]), ("after", [vandal, watch])):
        tiny.trainer(tmp_path / name, reward_funcs=functions, train_dataset=tiny.prompts(chat=chat)).train()
    assert len(seen) == 6 and seen[:3] == seen[3:]
    one, other = ((tmp_path / name / "completions.jsonl").read_text() for name in ("alone", "after"))
    assert one == other.replace('"vandal": 0.0, ', "") and "broken" not in one


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (
            {"reward_funcs": [tiny.good_words] * 2, "changes": {"reward_weights": [1.0]}},
            ("`reward_weights`", "1", "2 reward functions", "one for each"),
        ),
        (
            {"reward_funcs": tiny.good_words, "changes": {"reward_weights": [1.0, 1.0]}},
            ("`reward_weights`", "2", "1 reward functions", "one for each"),
        ),
        (
            {"reward_funcs": [tiny.good_words] * 3, "reward_processing_classes": [None] * 2},
            ("`reward_processing_classes`", "2", "3 reward functions", "None for a callable"),
        ),
        ({"reward_funcs": None}, ("`reward_funcs`", "nothing", "a function, a reward model, or a list")),
        ({"reward_funcs": []}, ("`reward_funcs`", "nothing", "a function, a reward model, or a list")),
        ({"reward_funcs": 3}, ("`reward_funcs`", "3", "a callable, a reward model or the name of one")),
    ],
)
def test_rewards_that_do_not_match_their_settings_are_rejected(tmp_path, arguments, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, **arguments)
    assert_says(error, *pieces)


def test_a_reward_model_with_a_smaller_vocabulary_asks_for_its_tokenizer(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_funcs=tiny.scalar_model(tiny.llama(vocab_size=20)))
    assert_says(error, "`reward_processing_classes`", "20 embeddings", tiny.VOCAB, "own tokenizer")


@pytest.mark.parametrize("own_tokenizer", [True, False])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_a_reward_model_of_several_labels_is_rejected(tmp_path, kind, own_tokenizer):
    """The first label of a sentiment classifier is usually the negative one."""
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config) if kind == "classifier" else tiny.llama()
    tokenizers = tiny.tokenizer() if own_tokenizer else None
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_funcs=model, reward_processing_classes=tokenizers)
    assert_says(error, "`reward_funcs`", type(model).__name__, "num_labels=1", "a function")
