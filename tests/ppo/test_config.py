"""The configuration: TRL's fields and this package's, from Python, the command line and YAML."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import typing
from typing import Any, Literal

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from tests import tiny
from tests.cli.training import flags
from tests.trl_fields import TRL_FIELDS, default, fields
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.advantages import AdvantageEstimator, RewardScale, ScorePosition
from trl_trustkl.controllers import CONTROLLERS, AdaptiveKL, ControllerName, FixedKL
from trl_trustkl.divergences import ESTIMATORS, EstimatorName, KLEstimatorName
from trl_trustkl.options import about, dict_fields, fits, typed_fields
from trl_trustkl.ppo.training_fields import TrainingFields
from trl_trustkl.surrogates import SURROGATES, ClipRuleName
from trl_trustkl.trl_compat import ppo_base as _base

pytestmark = pytest.mark.filterwarnings("ignore")

DESIGN_FIELDS: dict[str, Any] = {
    "kl_estimator": "k1",
    "kl_estimator_kwargs": None,
    "kl_placement": "reward",
    "kl_offpolicy": False,
    "kl_controller": "fixed",
    "kl_controller_kwargs": None,
    "kl_target": None,
    "kl_horizon": 10_000,
    "anchor_max_kl": None,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "clip_rule": "ppo",
    "clip_kwargs": None,
    "loss_aggregation": None,
    "cliprange_high": None,
    "clip_value": True,
    "trust_coef": 0.0,
    "trust_estimator": "exact",
    "trust_controller": "fixed",
    "trust_target": None,
    "trust_controller_kwargs": None,
    "trust_stop": None,
    "response_mask_kl": None,
    "trust_max_kl": None,
    "trust_max_kl_token": None,
    "trust_max_kl_response": None,
    "trust_lr_target": None,
    "advantage_estimator": "gae",
    "num_generations": 1,
    "scale_rewards": "group",
    "whiten_advantages": None,
    "detach_value_head": True,
    "value_learning_rate": None,
    "measure_fraction": 1.0,
    "attribution_every": 0,
    "chat_template_kwargs": None,
    "log_completions": False,
    "num_completions_to_print": None,
    "stop_token": None,
    "generation_kwargs": None,
    "reward_weights": None,
    "model_init_kwargs": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": False,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "score_position": "after_eos",
    "panic_kl": None,
    "max_refused": 5,
    "reward_retries": 0,
    "grace_seconds": 20.0,
}
"""What this package adds, with the defaults."""


# -- fields ------------------------------------------------------------------------------------------------------------


def test_every_field_of_trl_stays_with_its_default():
    ours = fields(TrustKLPPOConfig)
    assert {name: ours[name].default for name in TRL_FIELDS} == TRL_FIELDS
    assert set(fields(_base._BaseConfig)) <= set(ours)


def test_the_fields_added_are_those_of_the_design_with_its_defaults():
    ours = fields(TrustKLPPOConfig)
    assert {name: ours[name].default for name in DESIGN_FIELDS} == DESIGN_FIELDS
    assert set(ours) - set(fields(_base.PPOConfig)) == set(DESIGN_FIELDS) - set(TRL_FIELDS)


def test_every_added_field_says_what_it_is():
    for name in DESIGN_FIELDS:
        assert len(fields(TrustKLPPOConfig)[name].metadata["help"]) > 20, name


# -- ranges, help texts and copies -------------------------------------------------------------------------------------


def test_every_number_has_a_range_and_its_default_lies_in_it():
    without = set()
    for field, hint in typed_fields(TrustKLPPOConfig):
        own, value = about(field), default(field)
        if own.range is None and own.group and {int, float} & {hint, *typing.get_args(hint)}:
            without.add(field.name)
        if own.range is not None and value is not None:
            assert fits(value, hint) and own.range.holds(value), field.name
    assert without == {"num_sample_generations"}


def test_the_fields_documented_here_are_ours_and_those_of_trl_that_a_user_sets():
    documented = {name for name, field in fields(TrustKLPPOConfig).items() if about(field).group}
    computed = {
        "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
        "mini_batch_size",
    }  # fmt: skip
    others = {"sft_model_path", "reward_model_path", "push_to_hub"}
    assert documented == {*DESIGN_FIELDS, *TRL_FIELDS, "max_grad_norm"} - computed - others


def test_a_field_declared_again_keeps_type_default_and_help_of_its_base():
    base, ours = fields(_base.PPOConfig), fields(TrustKLPPOConfig)
    base_types, our_types = typing.get_type_hints(_base.PPOConfig), typing.get_type_hints(TrustKLPPOConfig)
    declared = {*TrustKLPPOConfig.__annotations__, *TrainingFields.__annotations__}
    again = (declared & set(base)) - {"kl_estimator", "stop_token", "max_grad_norm", "ds3_gather_for_generation"}
    assert len(again) > 20
    for name in again:
        assert (default(ours[name]), our_types[name]) == (default(base[name]), base_types[name]), name
        assert ours[name].metadata == base[name].metadata, name


def test_a_configuration_can_be_copied_and_pickled(tmp_path):
    config = tiny.config(tmp_path, **{name: value for name, value in OPTIONS.items() if name != "use_cpu"})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "names"),
    [
        (EstimatorName, ESTIMATORS),
        (KLEstimatorName, [*ESTIMATORS, "exact"]),
        (ControllerName, CONTROLLERS),
        (ClipRuleName, SURROGATES),
    ],
    ids=["estimators", "estimators and exact", "controllers", "clip rules"],
)
def test_the_names_allowed_are_those_that_exist(alias, names):
    assert list(typing.get_args(alias)) == list(names)


@pytest.mark.parametrize(
    ("field", "alias"),
    [
        ("kl_estimator", KLEstimatorName),
        ("kl_placement", Literal["reward", "loss", "both"]),
        ("trust_estimator", Literal["exact", "k1", "k3"]),
        ("kl_controller", ControllerName),
        ("trust_controller", ControllerName),
        ("clip_rule", ClipRuleName),
        ("score_position", ScorePosition),
        ("advantage_estimator", AdvantageEstimator),
        ("scale_rewards", RewardScale),
    ],
)
def test_a_field_is_typed_by_the_names_it_allows(field, alias):
    assert typing.get_type_hints(TrustKLPPOConfig)[field] == alias
    assert fields(TrustKLPPOConfig)[field].default in typing.get_args(alias)


# -- from the command line and YAML ------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "kl_estimator": "k3",
    "kl_controller": "adaptive",
    "kl_target": 6.5,
    "kl_horizon": 300,
    "kl_controller_kwargs": {"clip": 0.3, "max_coef": 2.0},
    "clip_rule": "spo",
    "cliprange_high": 0.28,
    "clip_value": False,
    "trust_stop": 0.02,
    "whiten_advantages": False,
    "score_position": "eos",
    "detach_value_head": False,
    "value_learning_rate": 1e-4,
    "measure_fraction": 0.5,
    "attribution_every": 8,
    "chat_template_kwargs": {"enable_thinking": False},
    "stop_token": "none",
    "generation_kwargs": {"top_p": 0.9, "suppress_tokens": [3, 4]},
    "reward_weights": [1.0, 0.5],
    "model_init_kwargs": {"dtype": "bfloat16"},
    "num_mini_batches": 2,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
}


def assert_has(config: TrustKLPPOConfig, options: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_command_line_sets_every_kind_of_field(tmp_path, parser):
    words = flags({"output_dir": tmp_path} | OPTIONS)
    arguments = {"args": words} if parser is HfArgumentParser else {"args": words, "return_remaining_strings": False}
    if parser is HfArgumentParser:
        (config,) = parser(TrustKLPPOConfig).parse_args_into_dataclasses(**arguments)
    else:
        (config,) = parser(TrustKLPPOConfig).parse_args_and_config(**arguments)
    assert_has(config, OPTIONS)


@pytest.mark.parametrize("as_json", [False, True], ids=["mapping", "JSON string"])
def test_a_yaml_file_sets_every_kind_of_field(tmp_path, as_json):
    options = {
        name: json.dumps(value) if as_json and isinstance(value, dict) else value for name, value in OPTIONS.items()
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"output_dir": str(tmp_path)} | options))  # JSON is YAML
    (config,) = TrlParser(TrustKLPPOConfig).parse_args_and_config(["--config", str(file)])
    assert_has(config, OPTIONS)


def test_the_command_line_overrides_the_yaml_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"output_dir": str(tmp_path)} | OPTIONS))
    flags = ["--config", str(file), "--kl_target", "2.5", "--generation_kwargs", '{"top_k": 5}']
    (config,) = TrlParser(TrustKLPPOConfig).parse_args_and_config(flags)
    assert_has(config, OPTIONS | {"kl_target": 2.5, "generation_kwargs": {"top_k": 5}})


def test_a_plain_yaml_file_of_transformers_is_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"output_dir": str(tmp_path)} | OPTIONS))
    (config,) = HfArgumentParser(TrustKLPPOConfig).parse_yaml_file(str(file))
    assert_has(config, OPTIONS)


def test_an_unknown_name_is_rejected_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(TrustKLPPOConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--clip_rule", "pp0"]
        )
    error = capsys.readouterr().err
    assert "--clip_rule" in error and "pp0" in error and "rollback" in error


def test_a_configuration_can_be_converted_to_a_dict_and_back(tmp_path):
    """transformers takes each field whose name ends in "_token" for a secret, and masks its value."""
    changes = {"measure_fraction": 1.0, "trust_max_kl_token": 0.5, "hub_token": "secret"}
    first = tiny.config(tmp_path, **OPTIONS | changes)
    kept = first.to_dict()
    assert json.loads(json.dumps(kept)) == kept
    assert (kept["trust_max_kl_token"], kept["hub_token"]) == (0.5, "<HUB_TOKEN>")
    (second,) = HfArgumentParser(TrustKLPPOConfig).parse_dict(kept)
    assert second.to_dict() == first.to_dict()


# -- what is built from them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dict_fields(TrustKLPPOConfig))
def test_a_dict_is_copied_and_may_be_json(tmp_path, name):
    given = {"clip": 0.1} if name == "kl_controller_kwargs" else {"top_p": 0.5} if name == "generation_kwargs" else {}
    settings = {"kl_controller": "adaptive", "kl_target": 1.0}
    one = tiny.config(tmp_path, **settings, **{name: given})
    other = tiny.config(tmp_path, **settings, **{name: json.dumps(given)})
    assert getattr(one, name) == getattr(other, name) == given
    getattr(one, name)["changed"] = True
    assert "changed" not in given


def test_the_controller_is_built_from_its_fields(tmp_path):
    assert tiny.config(tmp_path, kl_coef=0.3).build_kl_controller() == FixedKL(0.3)
    settings = {"kl_controller": "adaptive", "kl_target": 4.0, "kl_coef": 0.3}
    assert tiny.config(tmp_path, **settings).build_kl_controller() == AdaptiveKL(0.3, 4.0, horizon=10_000)
    assert tiny.config(tmp_path, **settings, kl_horizon=50).build_kl_controller() == AdaptiveKL(0.3, 4.0, horizon=50)
    controller = tiny.config(
        tmp_path, **settings, kl_controller_kwargs={"horizon": 70, "clip": 0.4}
    ).build_kl_controller()
    assert controller == AdaptiveKL(0.3, 4.0, horizon=70, clip=0.4)


@pytest.mark.parametrize(("high", "expected"), [(None, 0.1), (0.3, 0.3)])
def test_the_upper_clip_range_is_the_lower_one_unless_it_is_set(tmp_path, high, expected):
    config = tiny.config(tmp_path, cliprange=0.1, cliprange_high=high)
    assert (config.low, config.high) == (0.1, expected)


def test_a_limit_that_is_off_is_none(tmp_path):
    assert (tiny.config(tmp_path).value_range, tiny.config(tmp_path).norm_limit) == (0.2, 1.0)
    for off in (0, 0.0, None):
        config = tiny.config(tmp_path, clip_value=False, max_grad_norm=off)
        assert (config.value_range, config.norm_limit) == (None, None)


# -- the best checkpoint -----------------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("score", True),
        ("eval_score", True),
        ("held_out_score", True),
        ("kl", False),
        ("eval_kl", False),
        ("held_out_kl", False),
        ("eval_held_out_kl", False),
    ],
)
@pytest.mark.parametrize("how", [{"load_best_model_at_end": True}, {"save_strategy": "best"}, {}], ids=str)
def test_a_greater_score_and_a_lower_kl_are_better(tmp_path, metric, greater, how):
    """Also for one of several evaluation sets, whose name precedes the metric's."""
    changes = EVALUATED | how | {"metric_for_best_model": metric}
    assert tiny.config(tmp_path, **changes).greater_is_better is greater
    assert tiny.config(tmp_path, **changes, greater_is_better=not greater).greater_is_better is not greater


def test_the_better_direction_is_kept_in_a_copy(tmp_path):
    config = tiny.config(tmp_path, **EVALUATED, load_best_model_at_end=True, metric_for_best_model="kl")
    (other,) = HfArgumentParser(TrustKLPPOConfig).parse_dict(config.to_dict())
    for copied in (other, dataclasses.replace(config, max_steps=5)):
        assert (copied.metric_for_best_model, copied.greater_is_better) == ("kl", False)
    assert tiny.config(tmp_path).greater_is_better is None
