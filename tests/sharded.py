"""FSDP2 on CPUs: accelerate shards only with GPUs, so that it has to be told that two gloo processes are GPUs."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

EXAMPLE = {
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


def on_cpus(**changes: str) -> None:
    """Let accelerate use FSDP2 in this process, which is one of several on CPUs, as `accelerate launch` would configure it."""
    os.environ.update(EXAMPLE | {"ACCELERATE_TORCH_DEVICE": "cpu"} | changes)

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend
