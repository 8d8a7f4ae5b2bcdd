"""The configurations of GRPO and RLOO: TRL's fields, and those of the anchor's controller and the trust region."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from trl import GRPOConfig, RLOOConfig

from trl_trustkl import TrustKLGRPOConfig, TrustKLPPOConfig, TrustKLRLOOConfig
from trl_trustkl.controllers import AdaptiveKL, DualKL, FixedKL
from trl_trustkl.errors import ConfigError
from trl_trustkl.grpo.config import TrustRegionFields, build_kl_controller

CONFIGS = {TrustKLGRPOConfig: GRPOConfig, TrustKLRLOOConfig: RLOOConfig}
EACH = pytest.mark.parametrize("config", CONFIGS, ids=["grpo", "rloo"])
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@EACH
def test_the_fields_and_defaults_of_trl_are_kept(config):
    own = {each.name for each in dataclasses.fields(TrustRegionFields)}
    ours, trl = config("run", **CPU), CONFIGS[config]("run", **CPU)
    names = {each.name for each in dataclasses.fields(ours)}
    assert names == own | {each.name for each in dataclasses.fields(trl)}
    changed = [name for name in names - own if getattr(ours, name) != getattr(trl, name)]
    assert set(changed) <= {"logging_dir", "accelerator_config"}


def test_the_added_fields_have_the_names_of_ppo():
    assert {each.name for each in dataclasses.fields(TrustRegionFields)} <= set(TrustKLPPOConfig.__dataclass_fields__)


@EACH
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trust_max_kl": 0.0}, "`trust_max_kl` got 0.0; it must be a positive number of nats per token"),
        ({"trust_max_kl": -1.0}, "`trust_max_kl` got -1.0"),
        ({"trust_max_kl_token": 0.0}, "`trust_max_kl_token` got 0.0; it must be a positive number of nats"),
        ({"trust_max_kl_response": -1.0}, "must be a positive number of nats per response"),
        ({"anchor_max_kl": 0}, "`anchor_max_kl` got 0; it must be a positive number of nats per response"),
        (
            {"anchor_max_kl": 5.0, "sync_ref_model": True, "beta": 0.1},
            "`anchor_max_kl` got 5 with sync_ref_model=True, which moves the reference",
        ),
        ({"trust_stop": float("nan")}, "`trust_stop` got nan"),
        ({"trust_lr_target": "0.1"}, "`trust_lr_target` got '0.1'"),
        ({"panic_kl": True}, "`panic_kl` got True"),
        ({"kl_controller": "adaptiv", "beta": 0.1}, "`kl_controller` got 'adaptiv'; .* Did you mean 'adaptive'"),
        ({"kl_controller": "adaptive", "beta": 0.0, "kl_target": 0.1}, "`beta` got 0.0 .* such as beta=0.04"),
        ({"kl_controller": "dual", "beta": 0.1}, "`kl_target` got None with kl_controller='dual'"),
        ({"kl_target": 0.1}, "`kl_target` got 0.1, but kl_controller='fixed' ignores it"),
        ({"kl_target": -0.1, "kl_controller": "dual", "beta": 0.1}, "`kl_target` got -0.1"),
        ({"kl_horizon": 0}, "`kl_horizon` got 0"),
        ({"kl_controller_kwargs": "{no json"}, "`kl_controller_kwargs` got '{no json', which is not JSON"),
        (
            {"kl_controller": "dual", "beta": 0.1, "kl_target": 0.1, "kl_controller_kwargs": {"coef": 1.0}},
            "`kl_controller_kwargs` got 'coef'; set `beta` instead",
        ),
        (
            {"kl_controller": "dual", "beta": 0.1, "kl_target": 0.1, "kl_controller_kwargs": {"lr": -1.0}},
            r"`kl_controller_kwargs\['lr'\]` got -1.0",
        ),
    ],
)
def test_a_value_that_cannot_work_is_an_error_that_names_it(config, changes, said):
    with pytest.raises(ConfigError, match=said):
        config("run", **CPU | changes)


@EACH
def test_the_controller_starts_at_beta_and_holds_the_target(config):
    args: Any = config("run", **CPU, beta=0.2, kl_controller="adaptive", kl_target=0.1, kl_horizon=500)
    assert build_kl_controller(args, args.beta) == AdaptiveKL(coef=0.2, target=0.1, horizon=500)
    args = config("run", **CPU, beta=0.2, kl_controller="dual", kl_target=0.1, kl_controller_kwargs='{"lr": 0.3}')
    assert build_kl_controller(args, args.beta) == DualKL(coef=0.2, target=0.1, lr=0.3)
    assert isinstance(build_kl_controller(config("run", **CPU), 0.0), FixedKL)


@EACH
def test_a_limit_whose_name_ends_like_a_secret_is_not_masked(config):
    """transformers masks the value of each field whose name ends in "_token"."""
    saved = config("run", **CPU, trust_max_kl_token=0.5, hub_token="secret").to_dict()
    assert (saved["trust_max_kl_token"], saved["hub_token"]) == (0.5, "<HUB_TOKEN>")


def test_values_that_trl_converts_are_left_to_trl():
    assert TrustKLGRPOConfig("run", **CPU, scale_rewards=True).scale_rewards == "group"
