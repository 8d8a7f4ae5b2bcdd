"""Errors for configurations that cannot work: the field, the value received, what is valid and what to do."""

from __future__ import annotations

import math

import pytest

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.controllers import CONTROLLERS
from trl_trustkl.divergences import ESTIMATORS
from trl_trustkl.errors import ConfigError
from trl_trustkl.surrogates import SURROGATES
from trl_trustkl.trust.limits import HARD_LIMITS

pytestmark = pytest.mark.filterwarnings("ignore")

NAN, INF = math.nan, math.inf


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "options", "nearest"),
    [
        ("kl_estimator", "forward", (*ESTIMATORS, "exact"), "forward_kl"),
        ("kl_estimator", "exat", (*ESTIMATORS, "exact"), "exact"),
        ("kl_controller", "adaptve", CONTROLLERS, "adaptive"),
        ("trust_controller", "adaptve", CONTROLLERS, "adaptive"),
        ("clip_rule", "roll-back", SURROGATES, "rollback"),
        ("kl_placement", "reword", ("reward", "loss", "both"), "reward"),
        ("trust_estimator", "exct", ("exact", "k1", "k3"), "exact"),
        ("stop_token", "EOS_", ("eos", "none"), None),
        ("stop_token", "eso", ("eos", "none"), "eos"),
        ("score_position", "after-eos", ("after_eos", "eos"), "after_eos"),
        ("advantage_estimator", "rlo", ("gae", "grpo", "rloo"), "rloo"),
        ("scale_rewards", "groups", ("group", "batch", "none"), "group"),
    ],
)
def test_an_unknown_name_is_answered_with_those_that_exist_and_the_nearest(tmp_path, field, value, options, nearest):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", repr(value), *map(repr, options))
    assert ("Did you mean" in str(error.value)) == (nearest is not None)
    if nearest is not None:
        assert_says(error, f"Did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"kl_estimator_kwargs": {"order": 0.5}}, ("`kl_estimator_kwargs`", "'order'", "'k1'", "leave it empty")),
        ({"clip_kwargs": {"delta": 1}}, ("`clip_kwargs`", "'delta'", "'ppo'", "leave it empty")),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"clap": 1}},
            ("`kl_controller_kwargs`", "'clap'", "'clip'", "'horizon'", "Did you mean 'clip'?"),
        ),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": '{"clip": -1}'},
            ("`kl_controller_kwargs['clip']`", "-1", "> 0"),
        ),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"horizon": 8, "clip": 1.0}},
            ("`kl_controller_kwargs['horizon']` got 8", "above 8", "1 × 8"),
        ),
    ],
)
def test_an_unknown_argument_of_a_mechanism_is_named(tmp_path, settings, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, *pieces)


# -- numbers -----------------------------------------------------------------------------------------------------------

ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 1.0}


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        (ADAPTIVE | {"kl_target": 0.0}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_target": -1.0}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_target": NAN}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_horizon": 0}, ("positive number of responses",)),
        (ADAPTIVE | {"kl_horizon": -5}, ("positive number of responses",)),
        (ADAPTIVE | {"kl_horizon": 1}, ("`kl_horizon` got 1", "above 1.6", "0.2 × 8")),
        ({"cliprange": 0.0}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange": 1.0}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange": NAN}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange_high": 0.0}, ("> 0", "the same as cliprange")),
        ({"cliprange_value": 0.0}, ("> 0", "clip_value=False")),
        ({"kl_coef": -0.1}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": INF}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": "a lot"}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": True}, (">= 0", "0 turns the anchor off")),
        ({"trust_coef": -1.0}, (">= 0", "0 turns the penalty off")),
        ({"vf_coef": -1.0}, (">= 0",)),
        ({"gamma": 1.1}, ("[0, 1]",)),
        ({"lam": -0.1}, ("[0, 1]",)),
        ({"temperature": 0.0}, ("> 0", "temperature=0.01")),
        ({"learning_rate": -1.0}, (">= 0",)),
        ({"learning_rate": "1e-5"}, (">= 0", "without quotes", "1.0e-5")),
        ({"max_grad_norm": "1.0"}, (">= 0", "without quotes")),
        ({"value_learning_rate": -1.0}, (">= 0",)),
        ({"measure_fraction": 0.0}, ("(0, 1]", "no way to turn the measurement off")),
        ({"measure_fraction": 1.5}, ("(0, 1]",)),
        ({"trust_stop": 0.0}, ("nats per token", "None turns it off")),
        ({"trust_max_kl": -1.0}, ("nats per token", "None turns it off")),
        ({"trust_max_kl_token": 0.0}, ("a positive number of nats", "None turns it off")),
        ({"trust_max_kl_response": -1.0}, ("nats per response", "None turns it off")),
        ({"anchor_max_kl": 0.0}, ("nats per response", "None turns it off")),
        ({"trust_lr_target": 0.0}, ("nats per token", "None turns it off")),
        ({"trust_target": -1.0}, ("nats per token", "None turns it off")),
        ({"missing_eos_penalty": -1.0}, (">= 0",)),
        ({"max_grad_norm": -1.0}, (">= 0", "turns it off")),
        ({"num_train_epochs": 0}, ("positive",)),
        ({"total_episodes": 0}, ("positive",)),
        ({"reward_weights": [1.0, NAN]}, ("list of finite numbers", "one for each reward function")),
        ({"reward_weights": 1.0}, ("list of finite numbers", "one for each reward function")),
    ],
    ids=lambda each: ",".join(f"{k}={v}" for k, v in each.items()) if isinstance(each, dict) else "",
)
def test_a_number_out_of_range_is_answered_with_the_range(tmp_path, settings, pieces):
    *_, (field, value) = settings.items()
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, f"`{field}`", f"got {value!r}", *pieces)


@pytest.mark.parametrize("value", [0, -1, 1.5])
@pytest.mark.parametrize(
    "field",
    [
        "num_ppo_epochs",
        "num_mini_batches",
        "response_length",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "local_rollout_forward_batch_size",
    ],
)
def test_batch_arithmetic_is_in_integers_from_1(tmp_path, field, value):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", f"got {value!r}", "integer >= 1")


@pytest.mark.parametrize("number", [3, 5, 16])
def test_mini_batches_that_do_not_divide_the_batch_are_answered_with_the_arithmetic(tmp_path, number):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, num_mini_batches=number)
    assert_says(error, "`num_mini_batches`", f"got {number}", "must divide", "4 × 2 = 8")
    assert_says(error, "per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.mark.parametrize("prefix", ["kl", "trust"])
@pytest.mark.parametrize("controller", ["adaptive", "threshold", "pid", "dual"])
def test_a_controller_that_multiplies_rejects_a_coefficient_of_0(tmp_path, prefix, controller):
    settings = {"controller": controller, "target": 1.0, "coef": 0.0}
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{f"{prefix}_{name}": value for name, value in settings.items()})
    assert_says(error, f"`{prefix}_coef`", "0.0", "> 0", "multiplies", "'fixed'")


# -- combinations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"kl_target": 3.0}, ("`kl_target`", "3.0", "kl_controller='fixed'", "'adaptive'", "None")),
        ({"kl_controller": "adaptive"}, ("`kl_target`", "None", "'adaptive'", "'fixed'")),
        *(
            ({"measure_fraction": 0.5, name: 0.1}, ("`measure_fraction`", "0.5", "must be 1", f"{name}=0.1", "subset"))
            for name in HARD_LIMITS
        ),
        (
            {"anchor_max_kl": 5.0, "sync_ref_model": True},
            ("`anchor_max_kl`", "5", "sync_ref_model=True", "moves the reference", "False", "None"),
        ),
        (
            {"trust_controller": "adaptive", "trust_coef": 0.1},
            ("`trust_target`", "None", "trust_controller='adaptive'", "'fixed'"),
        ),
        ({"trust_target": 0.1}, ("`trust_target`", "0.1", "trust_controller='fixed'", "'adaptive'", "None")),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"target": 2.0}},
            ("`kl_controller_kwargs`", "'target'", "set `kl_target` instead"),
        ),
        (
            {"kl_controller": "schedule", "kl_controller_kwargs": {"episodes": 10}},
            ("`kl_controller_kwargs`", "end_coef", "'schedule'"),
        ),
        ({"kl_offpolicy": True}, ("`kl_offpolicy`", "True", "kl_placement='reward'", "'loss' or 'both'")),
        ({"kl_placement": "loss"}, ("`kl_placement`", "'loss'", "kl_estimator='k1'", "zero", "'exact' or 'k3'")),
        ({"cliprange_high": 0.3, "clip_rule": "none"}, ("`cliprange_high`", "0.3", "clip_rule='none'", "None")),
        ({"cliprange_high": 0.3, "clip_rule": "sapo"}, ("`cliprange_high`", "0.3", "clip_rule='sapo'", "None")),
        (
            {"advantage_estimator": "grpo"},
            ("`num_generations`", "got 1", "advantage_estimator='grpo'", "at least 2", "4 to 16"),
        ),
        (
            {"advantage_estimator": "rloo", "num_generations": 4, "scale_rewards": "batch"},
            ("`scale_rewards`", "'batch'", "advantage_estimator='rloo'", "leave it out", "'grpo'"),
        ),
        (
            {"scale_rewards": False},
            ("`scale_rewards`", "'none'", "advantage_estimator='gae'", "leave it out", "'grpo'"),
        ),
        ({"stop_token": "eos", "stop_token_id": 2}, ("`stop_token`", "'eos'", "`stop_token_id`", "2", "only one")),
    ],
)
def test_options_that_contradict_each_other_are_both_named(tmp_path, settings, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, *pieces)


OF_THE_VALUE = {
    "gamma": 0.9, "lam": 1.0, "whiten_rewards": True, "score_position": "eos", "vf_coef": 0.0, "clip_value": False,
    "cliprange_value": 0.1, "detach_value_head": False, "value_learning_rate": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize(("field", "value"), OF_THE_VALUE.items())
def test_without_a_value_its_fields_keep_their_defaults(tmp_path, field, value, estimator):
    changes = {"advantage_estimator": estimator, "num_generations": 4}
    default = getattr(tiny.config(tmp_path, **changes), field)
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **changes, **{field: value})
    assert_says(error, f"`{field}` got {value!r} with advantage_estimator={estimator!r}", "no value", f"{default!r}")
    assert_says(error, "leave it out", "advantage_estimator='gae'")
    assert getattr(tiny.config(tmp_path, num_generations=4, **{field: value}), field) == value


@pytest.mark.parametrize(
    "field",
    [
        "kl_estimator_kwargs",
        "kl_controller_kwargs",
        "clip_kwargs",
        "trust_controller_kwargs",
        "generation_kwargs",
        "model_init_kwargs",
    ],
)
@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("order=0.5", ("not JSON", "write an object such as")),
        ("{'order': 0.5}", ("not JSON", "double quotes", '{"order": 0.5}')),
        ("[1]", ("a dict, or a JSON object",)),
        (3, ("a dict, or a JSON object",)),
    ],
)
def test_arguments_that_are_neither_a_dict_nor_json_are_rejected(tmp_path, field, value, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", value, *pieces)


@pytest.mark.parametrize("name", ["file", "file/run", ""])
def test_an_invalid_output_folder_is_rejected_before_the_run(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`output_dir` got .* must be a folder") as error:
        tiny.config(tmp_path / name if name else "")
    assert not name or f"{tmp_path / 'file'} is a file" in str(error.value)


@pytest.mark.parametrize("metric", [None, "loss", "eval_loss"])
@pytest.mark.parametrize("how", [{"load_best_model_at_end": True}, {"save_strategy": "best"}], ids=str)
def test_the_best_checkpoint_needs_a_metric_of_an_evaluation(tmp_path, metric, how):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1} | how
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **changes, metric_for_best_model=metric)
    assert_says(error, "`metric_for_best_model`", f"got {metric!r}", "'score', 'kl', 'length' or 'eos_rate'")


@pytest.mark.parametrize("metric", ["length", "eval_eos_rate", "eval_kl_length", "of_mine"])
@pytest.mark.parametrize("how", [{"load_best_model_at_end": True}, {"save_strategy": "best"}, {}], ids=str)
def test_a_metric_whose_better_direction_is_unknown_needs_it(tmp_path, metric, how):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1} | how
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **changes, metric_for_best_model=metric)
    assert_says(
        error, "`greater_is_better`", "got None", "True or False", f"metric_for_best_model={metric!r}", "'score'"
    )
    for greater in (True, False):
        config = tiny.config(tmp_path, **changes, metric_for_best_model=metric, greater_is_better=greater)
        assert config.greater_is_better is greater


def test_saving_the_best_needs_evaluations(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, save_strategy="best", metric_for_best_model="score")
    assert_says(error, "`save_strategy`", "'best'", "eval_strategy='steps'")
