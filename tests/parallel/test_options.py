"""Options of the engines, each with whether it works and what to do if it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.training_args import OptimizerNames

from trl_trustkl.parallel.options import deepspeed_options, fsdp_options, optimizer_option


def rejected(options: Any) -> dict[str, Any]:
    """The options that do not work, with their values; each has a fix."""
    found = [option for option in options if not option.works]
    assert all(option.fix for option in found)
    return {option.name: option.got for option in found}


def fsdp(version: int = 2, **changes: Any) -> dict[str, Any]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    for name, value in changes.items():
        setattr(plugin, name, value)
    return rejected(fsdp_options(plugin, version))


def test_options_of_fsdp():
    assert fsdp() == {}
    assert fsdp(version=1) == {"fsdp_version": 1}
    assert fsdp(cpu_offload=CPUOffloadPolicy()) == {"fsdp_offload_params": True}
    assert fsdp(activation_checkpointing=True) == {"fsdp_activation_checkpointing": True}
    assert fsdp(auto_wrap_policy=None) == {"fsdp_auto_wrap_policy": "NO_WRAP"}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_of_zero(stage):
    assert (
        rejected(deepspeed_options({"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}}})) == {}
    )


@pytest.mark.parametrize(
    ("zero", "other", "name", "got"),
    [
        ({"stage": 1}, {}, "zero_stage", 1),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer_device", "cpu"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offload_param_device", "nvme"),
        ({"stage": 3, "mics_shard_size": 2}, {}, "mics_shard_size", 2),
        ({"stage": 3, "zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size", 2),
        ({"stage": 3}, {"fp16": {"enabled": True}}, "fp16", True),
        ({"stage": 3}, {"scheduler": {"type": "WarmupLR"}}, "scheduler", {"type": "WarmupLR"}),
        ({"stage": 3}, {"optimizer": {"type": "AdamW"}}, "optimizer", {"type": "AdamW"}),
        ({"stage": 3}, {"torch_autocast": {"enabled": True}}, "torch_autocast", {"enabled": True}),
    ],
)
def test_options_of_deepspeed(zero, other, name, got):
    assert rejected(deepspeed_options({"zero_optimization": zero} | other)) == {name: got}


@pytest.mark.parametrize(
    ("optim", "works"),
    [
        ("adamw_torch", True),
        (OptimizerNames.ADAMW_TORCH_FUSED, True),
        ("sgd", True),
        (OptimizerNames.ADAMW_8BIT, False),
    ],
)
def test_optimizers(optim, works):
    assert optimizer_option(SimpleNamespace(optim=optim)).works is works
