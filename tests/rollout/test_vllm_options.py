"""The sampling settings of a run as vLLM's, and the options of vLLM that may be set."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests import tiny
from trl_trustkl.errors import ConfigError
from trl_trustkl.rollout.vllm_options import OPTIONS, SET_ELSEWHERE, VLLMSampling, check_vllm_options

VALID: dict[str, list[Any]] = {
    "top_k": [-1, 0, 1, 50],
    "top_p": [1, 1.0, 0.9, 1e-3],
    "min_p": [0, 0.0, 0.1, 1],
    "min_tokens": [0, 3],
    "bad_words": [[], ["no"], ("no", "never")],
    "allowed_token_ids": [[0], [3, 4], (5,)],
    "repetition_penalty": [1, 1.1, 0.5, 2],
    "presence_penalty": [0, -2, 2, 0.5],
    "frequency_penalty": [0, -2, 2, 0.5],
    "stop": [[], ["\n"], "\n", ("a", "b")],
}
INVALID: dict[str, list[Any]] = {
    "top_k": [-2, 1.5, True, "5", [5]],
    "top_p": [0, 1.1, -0.1, math.nan, True, "0.9"],
    "min_p": [-0.1, 1.1, math.inf, False],
    "min_tokens": [-1, 0.5, False],
    "bad_words": ["no", [""], [3], {"no"}],
    "allowed_token_ids": [[], [-1], [1.0], [True], 3, "3"],
    "repetition_penalty": [0, 2.1, -1, True],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "stop": ["", [""], [2], 2],
}
CUTS = {"top_k", "top_p", "min_p", "min_tokens", "bad_words", "allowed_token_ids"}


def test_the_tables_of_this_test_have_every_option():
    assert VALID.keys() == INVALID.keys() == OPTIONS.keys() and not OPTIONS.keys() & SET_ELSEWHERE.keys()
    assert {name for name, option in OPTIONS.items() if option.cuts} == CUTS


@pytest.mark.parametrize("name", VALID)
def test_values_that_vllm_takes_are_accepted(name):
    for value in [*VALID[name], None]:
        check_vllm_options({name: value}, corrected=False)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_values_that_it_does_not_take_are_errors(name, value, corrected):
    with pytest.raises(ConfigError) as error:
        check_vllm_options({name: value}, corrected=corrected)
    assert str(error.value) == f"`generation_kwargs[{name!r}]` got {value!r}; it must be {OPTIONS[name].valid}."


@pytest.mark.parametrize("name", VALID)
def test_an_option_that_removes_tokens_is_an_error_where_the_loss_is_corrected(name):
    off = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,), "min_tokens": (0,), "bad_words": ([],)}
    for value in VALID[name]:
        if name in CUTS and value not in off.get(name, ()):
            with pytest.raises(ConfigError, match="it removes tokens .* vllm_importance_sampling_correction=False"):
                check_vllm_options({name: value}, corrected=True)
        else:
            check_vllm_options({name: value}, corrected=True)


@pytest.mark.parametrize(("name", "field"), SET_ELSEWHERE.items())
def test_what_the_trainer_sets_is_an_error_that_names_the_field(name, field):
    said = f"set `{field}` instead" if field else "the trainer sets it"
    with pytest.raises(ConfigError, match=f"`generation_kwargs` got '{name}': 3; {said}"):
        check_vllm_options({name: 3}, corrected=False)


@pytest.mark.parametrize("name", ["top_n", "num_beams", "logit_bias", "suppress_tokens"])
def test_an_unknown_option_is_answered_with_those_that_exist(name):
    with pytest.raises(
        ConfigError, match=f"`generation_kwargs` got '{name}'; it must be one of 'allowed_token_ids', 'bad"
    ):
        check_vllm_options({name: 3}, corrected=False)


def test_all_options_that_cannot_be_set_are_in_one_message():
    with pytest.raises(ConfigError) as error:
        check_vllm_options({"max_tokens": 3, "top_n": 1, "top_p": 7, "top_k": 5, "min_p": 0}, corrected=True)
    said = str(error.value)
    assert all(
        each in said for each in ("set `response_length` instead.", "'top_n'; it", "['top_p']` got 7", "'top_k': 5")
    )
    assert "min_p'" not in said.split("it must be one of")[0]


def test_the_options_of_vllm_are_checked_instead_of_those_of_generate(tmp_path):
    tiny.config(tmp_path, use_vllm=True, generation_kwargs={"presence_penalty": 0.5})
    with pytest.raises(
        ConfigError, match="`generation_kwargs` got 'suppress_tokens'; it must be one of 'allowed_token_ids'"
    ):
        tiny.config(tmp_path, use_vllm=True, generation_kwargs={"suppress_tokens": [3]})
    with pytest.raises(ConfigError, match="it removes tokens"):
        tiny.config(tmp_path, use_vllm=True, generation_kwargs={"top_k": 5})
    changes = {"use_vllm": True, "vllm_importance_sampling_correction": False}
    tiny.config(tmp_path, generation_kwargs={"top_k": 5}, **changes)
    with pytest.raises(ConfigError, match="presence_penalty"):
        tiny.config(tmp_path, generation_kwargs={"presence_penalty": 0.5})


def test_the_parameters_of_a_response():
    """Filters are given although they are off: a server would take those of the model's generation config."""
    sampling = VLLMSampling(7, 0.6, (2, 5), {"min_p": 0.1, "stop": ["\n"], "top_k": None})
    assert sampling.parameters(11) == {
        "max_tokens": 7, "temperature": 0.6, "stop_token_ids": [2, 5], "ignore_eos": True, "logprobs": 0, "seed": 11,
        "top_k": 0, "top_p": 1.0, "min_p": 0.1, "repetition_penalty": 1.0, "stop": ["\n"],
    }  # fmt: skip
    assert sampling.parameters(12)["seed"] == 12
