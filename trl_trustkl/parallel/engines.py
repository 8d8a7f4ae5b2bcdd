"""The engines that shard the parameters of a run over its processes, and the models that they are given."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, distributed, nn

from .fsdp2 import FSDP2
from .sharding import REPLICATED, Replicated
from .zero import ZeRO, complete_model


def build_sharding(accelerator: Accelerator, *, saves: bool) -> Replicated:
    """The sharding that accelerate was configured with. saves: whether this process saves the model and checkpoints."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        return FSDP2(saves=saves)
    if kind == DistributedType.DEEPSPEED:
        return ZeRO(accelerator, saves=saves)
    return REPLICATED


def load_everywhere(model: Any) -> None:
    """Give the model's weights to the processes that have not loaded them.

    While a configuration of ZeRO-3 exists, transformers gives each process a part of every weight. With accelerate's
    `fsdp_cpu_ram_efficient_loading`, it loads them on the first process of a machine alone, and leaves those of the others on
    the meta device. The passes that check a model before it is sharded need them everywhere.
    """
    if isinstance(model, nn.Module):
        complete_model(model)
    enabled = all(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")))
    if not enabled or not distributed.is_initialized() or not isinstance(model, nn.Module):
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [sorted(name for name, tensor in tensors if tensor.is_meta)] * distributed.get_world_size()
    distributed.all_gather_object(missing, missing[0])
    names, device = {name for each in missing for name in each}, PartialState().device
    for name, tensor in tensors:
        if name not in names:
            continue
        weight = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
        distributed.broadcast(weight, src=0)
        if tensor.is_meta:
            _replace(model, name, weight.cpu())
    if names and (tie := getattr(model, "tie_weights", None)) is not None:
        tie()


def _replace(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(weight, requires_grad=model.get_parameter(name).requires_grad)
    else:
        module._buffers[last] = weight
