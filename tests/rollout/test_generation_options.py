"""Generation options: those that the trainer sets, and the ranges of those that a run may set."""

from __future__ import annotations

import math

import pytest

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError
from trl_trustkl.rollout.generation_options import check_generation_kwargs

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("max_new_tokens", "set response_length"),
        ("max_length", "set response_length"),
        ("temperature", "set temperature"),
        ("eos_token_id", "set stop_token_id"),
        ("pad_token_id", "tokenizer's pad token"),
        ("do_sample", "leave it out"),
        ("num_beams", "leave it out"),
        ("num_return_sequences", "leave it out"),
        ("use_cache", "leave it out"),
    ],
)
def test_generation_kwargs_that_the_trainer_sets_are_rejected(tmp_path, key, fix, as_json):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs=f'{{"{key}": 1}}' if as_json else {key: 1})
    assert_says(error, "`generation_kwargs`", repr(key), fix)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {"suppress_tokens": [1, 2]},
    ],
)
def test_options_within_their_ranges_are_accepted(options):
    check_generation_kwargs(options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 1.0}, "`generation_kwargs` got 'temperature': set temperature instead"),
        ({"max_new_tokens": 5}, "set response_length instead"),
        ({"eos_token_id": 2}, "set stop_token_id instead"),
        ({"num_beams": 2}, "the trainer depends on its value; leave it out"),
        ({"topk": 5}, "got 'topk'; it must be one of .*Did you mean 'top_k'"),
        ({"top_p": math.nan}, r"`generation_kwargs\['top_p'\]` got nan; it must be a finite number"),
        ({"penalty_alpha": math.inf}, r"`generation_kwargs\['penalty_alpha'\]` got inf"),
        ({"top_p": 1.5}, "`generation_kwargs` got {'top_p': 1.5}: "),
        ({"top_k": -1}, "`generation_kwargs` got {'top_k': -1}: "),
        ({"min_p": 2.0}, "`generation_kwargs` got {'min_p': 2.0}: "),
        ({"typical_p": 1.5}, "`generation_kwargs` got {'typical_p': 1.5}: "),
        ({"eta_cutoff": 1.0}, "`generation_kwargs` got {'eta_cutoff': 1.0}: "),
        ({"repetition_penalty": -1.0}, "`generation_kwargs` got {'repetition_penalty': -1.0}: "),
        ({"no_repeat_ngram_size": -2}, "`generation_kwargs` got {'no_repeat_ngram_size': -2}: "),
        ({"top_k": "many"}, "`generation_kwargs` got {'top_k': 'many'}: "),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        check_generation_kwargs(options)
