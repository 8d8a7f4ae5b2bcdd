"""The record of a single log of a TRL trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerState
from trl import GRPOConfig, RLOOConfig, SFTConfig

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.trl_compat.trl_logs import episodes_seen, kind_of, record_of


def args_of(config: Any = GRPOConfig, **changes: Any) -> Any:
    common = {"output_dir": "none", "report_to": "none", "bf16": False, "use_cpu": True, "beta": 0.1}
    return config(**common | changes)


@pytest.mark.parametrize(
    ("changes", "rule", "low", "high"),
    [
        ({}, "ppo", 0.2, 0.2),
        ({"epsilon_high": 0.28, "loss_type": "dr_grpo"}, "ppo", 0.2, 0.28),
        ({"importance_sampling_level": "sequence"}, "gspo", 0.2, 0.2),
        ({"importance_sampling_level": "sequence_token"}, "gspo", 0.2, 0.2),
        ({"delta": 4.0}, "dual", 0.2, 0.2),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo", math.nan, 4.0),
        ({"loss_type": "sapo"}, "sapo", math.nan, math.nan),
    ],
)
def test_clip_rules_of_grpo(changes, rule, low, high):
    record = record_of(args_of(**changes), TrainerState(global_step=3), {"loss": 0.0, "grad_norm": 0.5})
    assert record.trust.rule == rule
    assert (record.trust.low, record.trust.high) == pytest.approx((low, high), nan_ok=True)
    assert math.isnan(record.trust.gated) and record.binding == "unknown"


def test_gmpo_clips_the_log_ratio():
    experimental = pytest.importorskip("trl.experimental.gmpo")
    args = args_of(experimental.GMPOConfig, epsilon=0.4, epsilon_high=0.5)
    record = record_of(args, TrainerState(global_step=3), {"loss": 0.0, "grad_norm": 0.5})
    assert record.trust.rule == "gmpo"
    assert (1 - record.trust.low, 1 + record.trust.high) == pytest.approx((math.exp(-0.4), math.exp(0.5)))


@pytest.mark.parametrize(
    ("logs", "changes", "binding"),
    [
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 0.5}, {}, "unknown"),  # the share of the anchor is unknown
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 0.5}, {"beta": 0.0}, "none"),
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 2.0}, {}, "unknown"),  # as under Adam
        ({"clip_ratio/region_mean": 0.05, "grad_norm": 0.5}, {}, "clip"),
        ({"clip_ratio": 0.05, "grad_norm": 0.5}, {}, "clip"),  # the name in Liger's loss
        ({"grad_norm": 0.5}, {"beta": 0.0}, "unknown"),
        ({"clip_ratio/region_mean": None, "grad_norm": 0.5}, {"beta": 0.0}, "unknown"),
    ],
)
def test_binding_from_what_is_known(logs, changes, binding):
    assert record_of(args_of(**changes), TrainerState(global_step=1), {"loss": 0.0} | logs).binding == binding


def test_the_norm_of_the_gradient_binds_where_gradients_are_not_rescaled():
    logs = {"loss": 0.0, "clip_ratio/region_mean": 0.0, "grad_norm": 2.0}
    record = record_of(args_of(), TrainerState(global_step=1), logs, rescaled=False)
    assert record is not None and record.binding == "grad_norm"


def test_the_gradient_of_grpos_anchor():
    logs, state = {"loss": 0.0}, TrainerState(global_step=1)
    assert record_of(args_of(use_bias_correction_kl=True), state, logs).anchor.gradient == "partial"
    assert record_of(args_of(use_bias_correction_kl=False), state, logs).anchor.gradient == "biased"


def test_kinds_and_episodes():
    args = args_of(
        RLOOConfig, per_device_train_batch_size=8, gradient_accumulation_steps=3, num_iterations=2, num_generations=2
    )
    assert kind_of(args) == "rloo" and kind_of(args_of()) == "grpo" and kind_of(object()) is None
    assert [episodes_seen(args, step) for step in range(4)] == [0, 24, 24, 48]
    longer = args_of(RLOOConfig, per_device_train_batch_size=8, steps_per_generation=4, num_generations=2)
    assert [episodes_seen(longer, step) for step in (0, 1, 4, 5)] == [0, 32, 32, 64]
    assert kind_of(tiny.config("none")) is None


def test_other_trainers_write_nothing(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    assert record_of(args, TrainerState(), {"loss": 1.0}) is None
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    assert len(load_records(tmp_path)) == 3, "the logs of TrustKLPPOTrainer became records too"


pytestmark = pytest.mark.filterwarnings("ignore")
