"""The configuration: the fields of TRL's PPO and ours, from Python, the command line and YAML."""

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
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.advantages import ScorePosition
from trl_trustkl.controllers import CONTROLLERS, AdaptiveKL, ControllerName, FixedKL
from trl_trustkl.divergences import ESTIMATORS, EstimatorName, KLEstimatorName
from trl_trustkl.errors import ConfigError, NotAvailableYetError
from trl_trustkl.options import COUNT, POSITIVE, about, check_options, dict_fields, fits, option, typed_fields
from trl_trustkl.surrogates import SURROGATES, ClipRuleName
from trl_trustkl.trl_compat import ppo_base as _base

pytestmark = pytest.mark.filterwarnings("ignore")

TRL_FIELDS: dict[str, Any] = {
    "learning_rate": 3e-6,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "world_size": None,
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
}
"""What TRL 1.12's PPOConfig adds to its base, with the defaults."""

DESIGN_FIELDS: dict[str, Any] = {
    "kl_estimator": "k1",
    "kl_estimator_kwargs": None,
    "kl_placement": "reward",
    "kl_offpolicy": False,
    "kl_controller": "fixed",
    "kl_controller_kwargs": None,
    "kl_target": None,
    "kl_horizon": 10_000,
    "clip_rule": "ppo",
    "clip_kwargs": None,
    "cliprange_high": None,
    "clip_value": True,
    "trust_coef": 0.0,
    "trust_estimator": "exact",
    "trust_controller": "fixed",
    "trust_target": None,
    "trust_controller_kwargs": None,
    "trust_stop": None,
    "trust_max_kl": None,
    "trust_lr_target": None,
    "whiten_advantages": True,
    "detach_value_head": True,
    "value_learning_rate": None,
    "measure_fraction": 1.0,
    "stop_token": None,
    "generation_kwargs": None,
    "reward_weights": None,
    "model_init_kwargs": None,
    "score_position": "after_eos",
    "panic_kl": None,
    "max_refused": 5,
    "reward_retries": 0,
    "grace_seconds": 20.0,
}
"""What this package adds, with the defaults."""


def fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# -- fields ------------------------------------------------------------------------------------------------------------


def test_our_base_has_the_fields_and_defaults_of_trls():
    mine = fields(_base.PPOConfig)
    assert {name: mine[name].default for name in TRL_FIELDS} == TRL_FIELDS
    inherited = fields(_base._BaseConfig)
    assert set(mine) - set(inherited) == set(TRL_FIELDS) - set(inherited)


def test_our_base_equals_trls_own_configuration_field_by_field():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
    theirs, mine = fields(ppo.PPOConfig), fields(_base.PPOConfig)
    assert theirs.keys() == mine.keys()
    their_types, my_types = typing.get_type_hints(ppo.PPOConfig), typing.get_type_hints(_base.PPOConfig)
    for name in theirs:
        assert default(theirs[name]) == default(mine[name]), name
        assert their_types[name] == my_types[name], name


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


# -- what is known of them ---------------------------------------------------------------------------------------------


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
    others = {"sft_model_path", "reward_model_path", "ds3_gather_for_generation", "push_to_hub"}
    assert documented == {*DESIGN_FIELDS, *TRL_FIELDS, "max_grad_norm"} - computed - others


def test_a_field_declared_again_keeps_type_default_and_help_of_its_base():
    base, ours = fields(_base.PPOConfig), fields(TrustKLPPOConfig)
    base_types, our_types = typing.get_type_hints(_base.PPOConfig), typing.get_type_hints(TrustKLPPOConfig)
    again = (set(TrustKLPPOConfig.__annotations__) & set(base)) - {"kl_estimator", "stop_token", "max_grad_norm"}
    assert len(again) > 20
    for name in again:
        assert (default(ours[name]), our_types[name]) == (default(base[name]), base_types[name]), name
        assert ours[name].metadata == base[name].metadata, name


@dataclasses.dataclass
class Other:
    """Options of a configuration that is not PPO's."""

    size: int | None = option(None, "A size.", range=COUNT, fix="None: all.", group="a")
    width: float = option(1.0, "A width.", range=POSITIVE, fix="Use 1.")
    kind: Literal["a", "b"] = option("a", "A kind.", names={"c": 3})
    extra: dict | str | None = option(None, "A dict.", group="a")
    plain: bool = True


def test_the_checks_are_those_of_any_dataclass():
    for good in (
        {"size": 3},
        {"width": 2},
        {"kind": "c"},
        {"extra": {"a": 1}},
        {"extra": '{"a": 1}'},
        {"plain": False},
    ):
        check_options(other := Other(**good))
        assert other.extra in (None, {"a": 1})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"size": 0}, "`size` got 0; it must be an integer >= 1, or None. None: all."),
        ({"size": 1.5}, "`size` got 1.5; it must be an integer >= 1, or None. None: all."),
        ({"width": None}, "`width` got None; it must be a finite number > 0. Use 1."),
        ({"width": float("inf")}, "`width` got inf; it must be a finite number > 0. Use 1."),
        ({"kind": "d"}, "`kind` got 'd'; it must be one of 'a', 'b', 'c'."),
        ({"extra": "["}, "`extra` got '[', which is not JSON"),
        ({"plain": 1}, "`plain` got 1; it must be true or false."),
    ],
)
def test_the_checks_say_what_a_field_may_be(bad, message):
    with pytest.raises(ConfigError) as error:
        check_options(Other(**bad))
    assert str(error.value).startswith(message)


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
    "stop_token": "none",
    "generation_kwargs": {"top_p": 0.9, "suppress_tokens": [3, 4]},
    "reward_weights": [1.0, 0.5],
    "model_init_kwargs": {"dtype": "bfloat16"},
    "num_mini_batches": 2,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
}


def as_flags(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        texts = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, texts)]
    return flags


def assert_has(config: TrustKLPPOConfig, options: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_command_line_sets_every_kind_of_field(tmp_path, parser):
    flags = as_flags({"output_dir": tmp_path} | OPTIONS)
    arguments = {"args": flags} if parser is HfArgumentParser else {"args": flags, "return_remaining_strings": False}
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


def test_a_name_that_does_not_exist_is_refused_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(TrustKLPPOConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--clip_rule", "pp0"]
        )
    error = capsys.readouterr().err
    assert "--clip_rule" in error and "pp0" in error and "rollback" in error


def test_a_configuration_survives_the_way_through_a_dict(tmp_path):
    first = tiny.config(tmp_path, **{name: value for name, value in OPTIONS.items() if name != "stop_token"})
    kept = first.to_dict()
    assert json.loads(json.dumps(kept)) == kept
    # transformers writes "<STOP_TOKEN>" for the value of any field whose name ends in "_token".
    del kept["stop_token"]
    (second,) = HfArgumentParser(TrustKLPPOConfig).parse_dict(kept)
    assert second.to_dict() == first.to_dict()


# -- what is made of them ----------------------------------------------------------------------------------------------


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
    told = tiny.config(tmp_path, **settings, kl_controller_kwargs={"horizon": 70, "clip": 0.4}).build_kl_controller()
    assert told == AdaptiveKL(0.3, 4.0, horizon=70, clip=0.4)


@pytest.mark.parametrize(("high", "expected"), [(None, 0.1), (0.3, 0.3)])
def test_the_upper_clip_range_is_the_lower_one_unless_it_is_set(tmp_path, high, expected):
    config = tiny.config(tmp_path, cliprange=0.1, cliprange_high=high)
    assert (config.low, config.high) == (0.1, expected)


def test_a_limit_that_is_off_is_none(tmp_path):
    assert (tiny.config(tmp_path).value_range, tiny.config(tmp_path).norm_limit) == (0.2, 1.0)
    for off in (0, 0.0, None):
        config = tiny.config(tmp_path, clip_value=False, max_grad_norm=off)
        assert (config.value_range, config.norm_limit) == (None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True},
        {"torch_compile_backend": "eager"},
        {"torch_compile_mode": "default"},
        {"use_liger_kernel": True},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
    ],
)
def test_other_kernels_and_loops_are_refused_and_not_ignored(tmp_path, changes):
    with pytest.raises(
        NotAvailableYetError, match=rf"`{next(iter(changes)).removesuffix('_backend').removesuffix('_mode')}`"
    ):
        tiny.config(tmp_path, **changes)


def test_a_compiling_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(NotAvailableYetError, match="dynamo_backend"):
        tiny.config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"optim": "lomo"}, ("`optim`", "'lomo'", "backward", "'adafactor'")),
        ({"optim": "galore_adamw_layerwise"}, ("`optim`", "'galore_adamw_layerwise'", "undone")),
        ({"optim": "schedule_free_adamw"}, ("`optim`", "other weights")),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            ("`lr_scheduler_type`", "plateau", "`trust_lr_target`"),
        ),
    ],
)
def test_optimizers_and_schedules_that_cannot_work_are_refused_before_the_run(tmp_path, changes, pieces):
    with pytest.raises(NotAvailableYetError) as error:
        tiny.config(tmp_path, **changes)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


@pytest.mark.parametrize("name", ["file", "file/run", ""])
def test_an_output_folder_that_cannot_be_one_is_refused_before_the_run(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`output_dir` got .* must be a folder") as error:
        tiny.config(tmp_path / name if name else "")
    assert not name or f"{tmp_path / 'file'} is a file" in str(error.value)
