"""The engines that shard the parameters of a run over its processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..trl_compat.module import Module
from .sharding import REPLICATED, Replicated, Result


class FSDP2(Replicated):
    """PyTorch's FSDP2, configured by accelerate.

    Each layer is gathered for its pass. What is in no layer, such as the embeddings and the output head, is gathered for a pass
    of the model. Between passes, all parameters of the trained model are shards. The embeddings and the head of a separate
    reference stay gathered once they were used, since the head is part of passes of the policy.

    Weights are gathered in their dtype, and the passes are under autocast, as with one process. saves: whether this process
    saves, and gets what `complete` gathers.
    """

    sharded = True

    def __init__(self, *, saves: bool) -> None:
        self._saves = saves
        self._root: Any = None
        self._reference: Any = None
        self._layers: list[Any] = []
        self._reshards = True

    def place(self, reference: nn.Module, device: torch.device) -> None:
        """`prepare` moves the shards."""

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, reference: nn.Module | None
    ) -> tuple[nn.Module, Any]:
        # Outputs are views, of which none is changed in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None  # it would round losses and divergences to bf16
        layers = plugin.transformer_cls_names_to_wrap  # None: those of each model
        self._reshards = plugin.reshard_after_forward
        self._root, optimizer = accelerator.prepare(Root(model), optimizer)
        register_fsdp_forward_method(self._root, "run")
        self._layers = [
            each for each in self._root.modules() if isinstance(each, FSDPModule) and each is not self._root
        ]
        if reference is not None:
            plugin.transformer_cls_names_to_wrap = layers  # not the trained model's, which accelerate has set
            self._reference = fsdp2_prepare_model(accelerator, Root(reference))
            register_fsdp_forward_method(self._reference, "run")
        # Gathered parameters are made in the first pass, and keep the `requires_grad` of then; the first pass may be one with
        # the adapter disabled.
        self.gathered(lambda: None)
        return self._root, optimizer

    def run(self, call: Callable[[], Result]) -> Result:
        try:
            return self._root.run(call)
        finally:
            self.written()

    def run_reference(self, call: Callable[[], Result]) -> Result:
        return self.run(call) if self._reference is None else self._reference.run(call)

    def gathered(self, call: Callable[[], Result]) -> Result:
        def with_layers() -> Result:
            for layer in self._layers:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
            return call()

        try:
            return self.run(with_layers)
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(self._reshards, recurse=False)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def remake(self, tensor: Tensor) -> Callable[[Tensor], Tensor]:
        if not isinstance(tensor, DTensor):
            return super().remake(tensor)
        mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        device = tensor.device

        def remade(part: Tensor) -> Tensor:
            local = part.to(device, copy=True)
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

        return remade

    def written(self) -> None:
        """Give up what is gathered, so that the next pass gathers again."""
        for unit in (self._root, *self._layers):
            if unit is not None:
                unit.reshard()

    @torch.no_grad()
    def complete(self, tensor: Tensor) -> Tensor:
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return found.cpu() if self._saves else found.new_empty(0, device="cpu")

    @torch.no_grad()
    def part(self, complete: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or complete.shape != like.shape:
            return complete
        # Every process has the complete tensor, from a file; without a source, each takes its part and nothing is sent.
        found = distribute_tensor(complete, like.device_mesh, like.placements, src_data_rank=None)
        return self.remake(found)(found.to_local())  # a copy, which does not keep the complete tensor


class Root(Module):
    """The module around a model that an engine shards, with what accelerate reads of a model.

    The model's parts are called on their own, such as its backbone. In `run` this is a pass of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def run(self, call: Callable[[], Result]) -> Result:
        """The result of `call`."""
        return call()

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the layers, each of which is gathered by itself. A value head is one, as it has another dtype."""
        present = {type(module).__name__ for module in self.modules()}
        named = {name for m in self.model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
        return sorted(present & {*named, "ValueHead"})

    def tie_weights(self) -> None:
        """Tie the weights again that accelerate has loaded one by one."""
        for module in self.model.modules():
            if (tie := getattr(module, "tie_weights", None)) is not None:
                tie()


def load_everywhere(model: Any) -> None:
    """Give the model's weights to the processes that have not loaded them.

    With accelerate's `fsdp_cpu_ram_efficient_loading`, transformers loads them on the first process of a machine alone, and
    leaves those of the others on the meta device. The passes that check a model before it is sharded need them everywhere.
    """
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


def build_sharding(accelerator: Accelerator, *, saves: bool) -> Replicated:
    """The sharding that accelerate was configured with. saves: whether this process saves the model and checkpoints."""
    return FSDP2(saves=saves) if accelerator.distributed_type == DistributedType.FSDP else REPLICATED
