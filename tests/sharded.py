"""FSDP2 and ZeRO on CPUs: accelerate shards only with GPUs, so that it has to be told that two gloo processes are GPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""What `accelerate launch` makes of TRL's example configuration `fsdp2.yaml`, but for its bf16."""

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}
"""As above, for `zero3.yaml`."""
ZERO2 = ZERO3 | {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
}
ENGINES = {"fsdp2": FSDP2, "zero2": ZERO2, "zero3": ZERO3}


def require(engine: str) -> None:
    """Skip a test where what it needs is not installed."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'trl-trustkl[deepspeed]'")


def on_cpus(engine: str, **changes: str) -> None:
    """Let accelerate use an engine in this process, one of several on CPUs, as `accelerate launch` would configure it."""
    os.environ.update(ENGINES[engine] | {"ACCELERATE_TORCH_DEVICE": "cpu"} | changes)

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend
    if engine != "fsdp2":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # or it compiles its own collectives for shared memory
    if engine == "zero3":
        _shard_small_weights()


def engine() -> str:
    """The engine that this process uses."""
    if os.environ.get("ACCELERATE_USE_FSDP"):
        return "fsdp2"
    return "zero" + os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]


def _shard_small_weights() -> None:
    """By default each process keeps every weight of a tiny model complete, as it has fewer than 100,000 elements."""
    from accelerate.utils import DeepSpeedPlugin

    initialise = DeepSpeedPlugin.__post_init__

    def initialised(self: Any) -> None:
        initialise(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = initialised  # type: ignore[method-assign]


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor that may be a shard, complete on every process; with ZeRO the weight that is stepped, in float32."""
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).clone()
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def own(tensor: Tensor) -> Tensor:
    """A copy of this process's part, without what ZeRO-3 pads it with."""
    if hasattr(tensor, "ds_tensor"):
        part = tensor.ds_tensor.detach()
        start = part.numel() * torch.distributed.get_rank()
        return part[: max(0, tensor.ds_numel - start)].clone()
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
