"""Generation options: those that the trainer sets, and the ranges of those that a run may set."""

from __future__ import annotations

import math

import pytest
from transformers import GenerationConfig

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError
from trl_trustkl.rollout import generation_options
from trl_trustkl.rollout.generation_options import (
    REFUSED,
    SET_ELSEWHERE,
    WORKING,
    check_generation_kwargs,
    check_stop_ids,
    check_token_ids,
    compile_config,
    stop_strings,
)

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
        ("do_sample", "the trainer depends on its value"),
        ("num_beams", "the trainer depends on its value"),
        ("num_return_sequences", "the trainer depends on its value"),
        ("use_cache", "the trainer depends on its value"),
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
        ({"temperature": 1.0}, r"cannot be set: 'temperature': 1.0 \(set temperature instead\)"),
        ({"max_new_tokens": 5}, "set response_length instead"),
        ({"eos_token_id": 2}, "set stop_token_id instead"),
        ({"num_beams": 2}, r"'num_beams': 2 \(the trainer depends on its value\). Leave them out"),
        ({"topk": 5}, r"'topk': 5 \(generate\(\) has no such option. Did you mean 'top_k'\?\)"),
        ({"top_p": math.nan}, r"`generation_kwargs\['top_p'\]` got nan; it must be a finite number"),
        ({"min_p": math.inf}, r"`generation_kwargs\['min_p'\]` got inf"),
        ({"top_p": 1.5}, "`generation_kwargs` got {'top_p': 1.5}: "),
        ({"top_k": -1}, "`generation_kwargs` got {'top_k': -1}: "),
        ({"min_p": 2.0}, "`generation_kwargs` got {'min_p': 2.0}: "),
        ({"typical_p": 1.5}, "`generation_kwargs` got {'typical_p': 1.5}: "),
        ({"eta_cutoff": 1.0}, "`generation_kwargs` got {'eta_cutoff': 1.0}: "),
        ({"repetition_penalty": -1.0}, "`generation_kwargs` got {'repetition_penalty': -1.0}: "),
        ({"no_repeat_ngram_size": -2}, "`generation_kwargs` got {'no_repeat_ngram_size': -2}: "),
        ({"top_k": "many"}, "`generation_kwargs` got {'top_k': 'many'}: "),
        ({"top_h": 2.0}, "`generation_kwargs` got {'top_h': 2.0}: "),
        ({"encoder_repetition_penalty": -1.0}, "`generation_kwargs` got {'encoder_repetition_penalty': -1.0}: "),
        ({"encoder_no_repeat_ngram_size": -1}, "`generation_kwargs` got {'encoder_no_repeat_ngram_size': -1}: "),
        ({"bad_words_ids": [3]}, r"`generation_kwargs` got {'bad_words_ids': \[3\]}: "),
        ({"sequence_bias": []}, r"`generation_kwargs` got {'sequence_bias': \[\]}: "),
        ({"min_new_tokens": -1}, r"`generation_kwargs\['min_new_tokens'\]` got -1; it must be an integer >= 0"),
        ({"min_new_tokens": 1.5}, r"`generation_kwargs\['min_new_tokens'\]` got 1.5; it must be an integer >= 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        check_generation_kwargs(options)


# -- options without an effect -----------------------------------------------------------------------------------------


def test_every_option_of_the_installed_transformers_is_in_one_category():
    """A new version of transformers may have an option that has to be added to WORKING or REFUSED."""
    categories = [set(SET_ELSEWHERE), set(WORKING), set(REFUSED)]
    for option in GenerationConfig().to_dict():
        assert sum(option in category for category in categories) == 1, option


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_an_option_without_an_effect_is_refused_with_the_reason(tmp_path, option):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs={option: 7, "top_p": 0.9})
    assert_says(error, f"`generation_kwargs` got options that cannot be set: {option!r}")
    assert_says(error, f": 7 ({REFUSED[option]}). Leave them out; the options that may be set are ", "'top_p'")


def test_what_a_script_for_trl_0_11_passes_is_answered_in_one_message():
    given = {
        "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 3, "max_new_tokens": 32,
        "batch_size": 4, "return_prompt": False, "temperature": None,
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        check_generation_kwargs(given)
    assert_says(
        error,
        "'min_length': -1 (it counts the prompt",
        "'do_sample': True (the trainer depends on its value)",
        "'pad_token_id': 3 (set the tokenizer's pad token instead)",
        "'max_new_tokens': 32 (set response_length instead)",
        "'batch_size': 4, 'return_prompt': False (generate() has no such option.)",
    )
    assert "'top_k': 0.0" not in str(error.value) and "'top_p': 1.0" not in str(error.value)
    check_generation_kwargs({"top_k": 0.0, "top_p": 1.0})


def test_all_options_without_an_effect_are_in_one_message():
    given = {
        "penalty_alpha": 0.6,
        "length_penalty": 2.0,
        "top_k": 4,
        "early_stopping": True,
        "cache_config": {"nbits": 4},
    }
    with pytest.raises(ConfigError) as error:
        check_generation_kwargs(given)
    assert_says(
        error,
        "'penalty_alpha': 0.6 (only contrastive search uses it); ",
        "'length_penalty': 2.0, 'early_stopping': True (only beam search uses it); ",
        "'cache_config': {'nbits': 4} (only cache_implementation='quantized' uses it). Leave them out",
    )
    assert "'top_k': 4" not in str(error.value)


@pytest.mark.parametrize("option", [*REFUSED, *WORKING])
def test_the_default_of_an_option_is_accepted(option):
    check_generation_kwargs({option: None})
    defaults = GenerationConfig._get_default_generation_params()
    if option in defaults:
        check_generation_kwargs({option: defaults[option]})


@pytest.mark.parametrize("option", ["token_healing", "output_attentions", "early_stopping", "disable_compile"])
def test_a_flag_that_is_off_is_accepted(option):
    check_generation_kwargs({option: False})


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"cache_implementation": "paged"}, "'cache_implementation': 'paged' (generate() selects only 'dynamic', "),
        ({"cache_implementation": "hybrid"}, "'cache_implementation': 'hybrid' (generate() selects only 'dynamic', "),
        ({"disable_compile": True}, "'disable_compile': True (only cache_implementation='static' or "),
        ({"max_cache_len": 64, "cache_implementation": "offloaded"}, "'max_cache_len': 64 (only cache_implementation="),
        (
            {"compile_config": {}},
            "'compile_config': {} (only cache_implementation='static' without disable_compile uses",
        ),
        (
            {"compile_config": {"mode": None}, "cache_implementation": "offloaded_static"},
            "'compile_config': {'mode': None} (only cache_implementation='static' without disable_compile uses it)",
        ),
        (
            {"compile_config": {}, "cache_implementation": "static", "disable_compile": True},
            "'compile_config': {} (only cache_implementation='static' without disable_compile uses it)",
        ),
        ({"min_new_tokens": 3, "stop_strings": "."}, "'min_new_tokens': 3 (it does not hold back stop_strings)"),
    ],
)
def test_an_option_that_another_one_makes_ineffective_is_refused(options, refused):
    if options.keys() <= GenerationConfig().to_dict().keys():
        with pytest.raises(ConfigError) as error:
            check_generation_kwargs(options)
        assert_says(error, refused)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "compile_config": {}},
        {"cache_implementation": "static", "compile_config": {"mode": "default", "fullgraph": True, "dynamic": None}},
        {"cache_implementation": "static", "compile_config": {"options": {"epilogue_fusion": True}}},
        {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
        {"min_new_tokens": 3},
        {"stop_strings": ["."], "min_new_tokens": 0},
    ],
)
def test_an_option_with_what_it_needs_is_accepted(options):
    check_generation_kwargs(options)


def test_an_option_that_nobody_has_examined_is_refused(monkeypatch):
    monkeypatch.setattr(generation_options, "WORKING", ("top_p",))
    check_generation_kwargs({"top_p": 0.9})
    with pytest.raises(
        ConfigError, match=r"'top_k': 5 \(it is new in transformers \S+, and not known to have an effect\)"
    ):
        check_generation_kwargs({"top_k": 5})


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "inductor",
            "`generation_kwargs['compile_config']` got 'inductor'; it must be a dict of 'fullgraph', 'dynamic', ",
        ),
        ({"back_end": "eager"}, "`generation_kwargs['compile_config']` got 'back_end'; it must be one of 'backend', "),
        ({"back_end": "eager"}, "Did you mean 'backend'?"),
        ({"backend": "inductr"}, "`generation_kwargs['compile_config']['backend']` got 'inductr'; it must be one of "),
        ({"backend": 3}, "`generation_kwargs['compile_config']['backend']` got 3; it must be the name of a backend"),
        ({"mode": "fast"}, "`generation_kwargs['compile_config']['mode']` got 'fast'; it must be one of 'default', "),
        (
            {"mode": 1},
            "`generation_kwargs['compile_config']['mode']` got 1; it must be the name of a mode of torch.compile",
        ),
        (
            {"fullgraph": "yes"},
            "`generation_kwargs['compile_config']['fullgraph']` got 'yes'; it must be True or False",
        ),
        ({"dynamic": 1}, "`generation_kwargs['compile_config']['dynamic']` got 1; it must be True or False, or None"),
        ({"options": []}, "`generation_kwargs['compile_config']['options']` got []; it must be a dict"),
        ({"mode": "default", "options": {}}, "got both `mode` and `options`; torch.compile accepts only one"),
    ],
)
def test_what_torch_compile_does_not_know_is_an_error(tmp_path, given, said):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs={"cache_implementation": "static", "compile_config": given})
    assert_says(error, said)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"backend": "inductor", "mode": "reduce-overhead", "dynamic": False}),
        ({"dynamic": True, "mode": None}, {"backend": "inductor", "mode": None, "dynamic": True}),
        ({"options": {"epilogue_fusion": True}}, {"mode": None, "options": {"epilogue_fusion": True}}),
        ({"backend": "eager"}, {"backend": "eager", "mode": None}),
    ],
)
def test_a_dict_becomes_the_configuration_of_torch_compile(given, expected):
    found = compile_config({"compile_config": given})
    assert found.to_dict().items() >= expected.items()
    assert found._compile_all_devices, "transformers would not compile on a CPU"
    assert compile_config({}) is compile_config({"compile_config": None}) is None


# -- stop strings and stop tokens --------------------------------------------------------------------------------------


def test_stop_strings_are_one_or_several():
    assert stop_strings({}) == stop_strings({"stop_strings": None}) == []
    assert stop_strings({"stop_strings": "END"}) == ["END"]
    assert stop_strings({"stop_strings": ["a", "b"]}) == ["a", "b"]


@pytest.mark.parametrize("value", ["", [], ["a", ""], [3], 3, {"a": 1}])
def test_other_stop_strings_are_rejected(tmp_path, value):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs={"stop_strings": value})
    assert_says(error, "`generation_kwargs['stop_strings']`", repr(value), "a string, or a list of strings")


@pytest.mark.parametrize("option", [{"min_new_tokens": 3}, {"exponential_decay_length_penalty": [2, 1.5]}])
def test_an_option_that_acts_on_stop_tokens_needs_one(option):
    check_stop_ids(option, [2])
    with pytest.raises(ConfigError, match=f"got {next(iter(option))!r}: .* without a stop token; set stop_token='eos'"):
        check_stop_ids(option, [])


def test_a_bad_word_that_is_a_stop_token_is_refused():
    check_stop_ids({"bad_words_ids": [[2, 3], [4]]}, [2])
    with pytest.raises(ConfigError, match=r"'bad_words_ids' with \[\[2\]\], .* use suppress_tokens"):
        check_stop_ids({"bad_words_ids": [[2], [4]]}, [2])


@pytest.mark.parametrize(
    ("name", "fine", "wrong"),
    [
        ("suppress_tokens", [0, 41], [3, 42]),
        ("begin_suppress_tokens", [5], [42]),
        ("bad_words_ids", [[3], [4, 5]], [[3], [4, 42]]),
        ("sequence_bias", [[[3], -99], [[4, 5], 2.0]], [[[42], 1.0]]),
        ("sequence_bias", {(3,): -99}, {(42,): 1.0}),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(name, fine, wrong):
    check_token_ids({name: fine, "top_k": 99}, 42)
    check_token_ids({name: None}, 42)
    with pytest.raises(ConfigError) as error:
        check_token_ids({name: wrong}, 42)
    assert_says(error, f"`generation_kwargs[{name!r}]` got 42", "from 0 to 41")
