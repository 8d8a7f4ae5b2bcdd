"""What the engines offer and this version does not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy

from ..errors import NotAvailableYetError

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of `optim` whose moments are sharded as the parameters are."""
CLASSES = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Their classes. But for SGD with dampening, their state is 0 before the first step."""


class Option(NamedTuple):
    """An option of an engine or a field: its value, whether it is available, and what to do if it is not."""

    name: str
    got: Any
    works: bool
    fix: str


def engine_of(args: Any) -> str | None:
    """The engine that the configuration or the launcher asks for; None for complete parameters on each process."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP2"
    return "DeepSpeed" if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


def fsdp_options(plugin: Any, version: int) -> Iterator[Option]:
    """Those of accelerate's plugin for FSDP."""
    fix = "set fsdp_version: 2 in accelerate's configuration, or fsdp_config={'version': 2}"
    yield Option("fsdp_version", version, version == 2, fix)
    policy = getattr(plugin.auto_wrap_policy, "__name__", "NO_WRAP")
    yield Option("fsdp_offload_params", True, not isinstance(plugin.cpu_offload, CPUOffloadPolicy), "leave it false")
    yield Option(
        "fsdp_activation_checkpointing", True, not plugin.activation_checkpointing, "set gradient_checkpointing=True instead"
    )  # fmt: skip
    yield Option(
        "fsdp_auto_wrap_policy", policy, policy == "transformer_auto_wrap_policy", "use TRANSFORMER_BASED_WRAP"
    )


def deepspeed_options(config: dict[str, Any]) -> Iterator[Option]:
    """Those of a configuration of DeepSpeed."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    yield Option("zero_stage", stage, stage in (2, 3), "use 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device", "none")
        yield Option(f"{name}_device", device, device == "none", "leave it none")
    yield Option("fp16", True, config.get("fp16", {}).get("enabled", "auto") in ("auto", False), "use bf16, or float32")
    for name, fix in (("optimizer", "set `optim` instead"), ("scheduler", "set `lr_scheduler_type` instead")):
        yield Option(name, config.get(name), name not in config, fix)
    for name, off in (
        ("zero_hpz_partition_size", 1), ("zero_quantized_weights", False), ("zero_quantized_gradients", False),
        ("mics_shard_size", -1),
    ):  # fmt: skip
        got = zero.get(name, off)
        yield Option(name, got, got == off, "leave it out")
    for name in ("torch_autocast", "tensor_parallel", "sequence_parallel_size"):
        yield Option(name, config.get(name), not config.get(name), "leave it out")


def optimizer_option(args: Any) -> Option:
    """The field `optim`."""
    name = str(getattr(args.optim, "value", args.optim))
    return Option("optim", name, name in OPTIMIZERS, f"use one of {', '.join(OPTIMIZERS)}")


def check_optimizer(optimizer: Any, engine: str) -> None:
    """Raise NotAvailableYetError for an optimizer that cannot be used with the engine."""
    if type(optimizer) not in CLASSES:
        raise NotAvailableYetError(
            f"`optimizers` got a {type(optimizer).__name__}, which is not available with {engine}; use torch.optim.AdamW, Adam "
            "or SGD."
        )
    if engine == "DeepSpeed" and any(group.get("dampening") for group in optimizer.param_groups):
        raise NotAvailableYetError(
            "`optimizers` got an SGD with dampening, which is not available with DeepSpeed: its first step would be different. "
            "Leave `dampening` at 0."
        )
