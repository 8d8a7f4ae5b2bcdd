"""PyTorch's FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .root import Root
from .sharding import Replicated, Result


class FSDP2(Replicated):
    """PyTorch's FSDP2, configured by accelerate.

    Each layer is gathered for its pass. What is in no layer, such as the embeddings and the output head, is gathered for a pass
    of the model. Between passes, all parameters of the trained model are shards. The embeddings and the head of a separate
    reference stay gathered once they were used, since the head is part of passes of the policy.

    Weights are gathered in their dtype, and the passes are under autocast, as with one process. saves: whether this process
    saves, and gets what `complete` gathers. reshards: whether a layer is given up after its pass.
    """

    sharded = True
    shards_weights = True

    def __init__(self, *, saves: bool, reshards: bool = True) -> None:
        self._saves = saves
        self._root: Any = None
        self._reference: Any = None
        self._layers: list[Any] = []
        self._reshards = reshards
        self._held: list[Any] = []

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
        root, optimizer = accelerator.prepare(Root(model), optimizer)
        self.observe(root, optimizer)
        if reference is not None:
            plugin.transformer_cls_names_to_wrap = layers  # not the trained model's, which accelerate has set
            self._reference = fsdp2_prepare_model(accelerator, Root(reference))
        # Gathered parameters are made in the first pass, and keep the `requires_grad` of then; the first pass may be one with
        # the adapter disabled.
        self.gathered(lambda: None)
        return self._root, optimizer

    def loaded(self, model: nn.Module) -> AbstractContextManager[None]:
        if isinstance(model, FSDPModule):
            return self.holding(model)
        load_missing(model)
        return nullcontext()

    def observe(self, model: nn.Module, optimizer: Any, reference: nn.Module | None = None) -> Any:
        self._root, self._held = model, []
        self._layers = [each for each in model.modules() if isinstance(each, FSDPModule) and each is not model]
        return optimizer

    def run(self, call: Callable[[], Result]) -> Result:
        try:
            return self._root(call=call)
        finally:
            self.written()

    def run_reference(self, call: Callable[[], Result]) -> Result:
        return self.run(call) if self._reference is None else self._reference(call=call)

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

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        unit: Any = module if isinstance(module, FSDPModule) else self._root
        if unit in self._held:
            yield
            return
        separate = unit is not self._root and unit not in self._layers  # a reference, which TRL has sharded as a whole
        self._held.append(unit)
        try:
            if separate:
                unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
            yield
        finally:
            self._held.remove(unit)
            unit.reshard()
            if separate:
                unit.set_reshard_after_forward(self._reshards, recurse=False)
            if not self._held:  # a pass leaves what is in no layer gathered
                self.written()

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
        """Give up what is gathered, so that the next pass gathers again; what `holding` has is gathered again now."""
        for unit in (self._root, *self._layers):
            if unit is not None:
                unit.reshard()
        for unit in self._held:
            unit.unshard()

    def step(self, optimizer: Any) -> None:
        optimizer.step()
        self.written()

    @torch.no_grad()
    def complete(self, tensor: Tensor, like: Tensor) -> Tensor:
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return found.detach().cpu() if self._saves else found.new_empty(0, device="cpu")

    @torch.no_grad()
    def part(self, complete: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or complete.shape != like.shape:
            return complete
        # Every process has the complete tensor, from a file; without a source, each takes its part and nothing is sent.
        found = distribute_tensor(complete, like.device_mesh, like.placements, src_data_rank=None)
        return self.remake(found)(found.to_local())  # a copy, which does not keep the complete tensor


def load_missing(model: nn.Module) -> None:
    """Send the weights that the first process of a machine alone has loaded to the others, whose are on the meta device."""
    enabled = all(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")))
    if not enabled or not distributed.is_initialized():
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
