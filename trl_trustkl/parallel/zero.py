"""DeepSpeed's ZeRO."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks

from .root import Root
from .sharding import Replicated, Result
from .zero_optimizer import ZeROOptimizer


class Part(NamedTuple):
    """The elements of a flattened parameter that this process trains: those from `start` on.

    master: their values in float32. The engine steps these, and rounds them to the weights of the passes.
    """

    master: Tensor
    start: int


class ZeRO(Replicated):
    """DeepSpeed's ZeRO, configured by accelerate.

    Each process trains a part of each weight, in float32, and has the moments of this part. Stage 2 shards the gradients too,
    and stage 3 all weights: each module gathers those of its pass.

    DeepSpeed has public functions for a process's part under stage 3; under stages 1 and 2 the part is read from the attributes
    that they use. saves: whether this process saves, and gets what `complete` gathers.
    """

    sharded = True
    steps_in_backward = True

    def __init__(self, accelerator: Accelerator, *, saves: bool) -> None:
        plugin: Any = accelerator.state.deepspeed_plugin
        self._saves = saves
        self.shards_weights = plugin.zero_stage == 3
        self._engine: Any = None
        self._reference: Any = None
        self._above_layers: set[int] = set()
        self._parts: dict[int, Part] = {}
        self._trained: list[nn.Parameter] = []

    def place(self, reference: nn.Module, device: torch.device) -> None:
        if not self.shards_weights:
            super().place(reference, device)

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, reference: nn.Module | None
    ) -> tuple[nn.Module, Any]:
        # DeepSpeed does not look for tensors in the arguments that are objects of this package; it need not, since gradients
        # reach no tensor in them. And it calls functions of PyTorch by their earlier names.
        logging.getLogger("DeepSpeed").addFilter(lambda record: "'trl_trustkl." not in record.getMessage())
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        plugin: Any = accelerator.state.deepspeed_plugin
        steps = accelerator.gradient_accumulation_steps
        plugin.deepspeed_config |= {
            # Numbers that DeepSpeed asks for, and that nothing depends on: each backward pass says whether it is the last.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "train_batch_size": steps * accelerator.num_processes,
            "gradient_clipping": 0.0,  # see `clip`
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        self._trained = [parameter for group in groups for parameter in group["params"]]
        root = Root(model)
        self._find_layers(root)
        self._engine, _ = accelerator.prepare(root, optimizer)
        if self.shards_weights and reference is not None:
            self._reference = prepare_deepspeed(Root(reference), accelerator)
        if self.shards_weights:
            _use_heads_in(root, root if reference is None else nn.ModuleList([root, reference]))
        return self._engine, self._optimizer(groups)

    def loaded(self, model: nn.Module) -> AbstractContextManager[None]:
        from deepspeed import DeepSpeedEngine

        if isinstance(model, DeepSpeedEngine):
            return _releasing(model.module.parameters(), model) if self.shards_weights else nullcontext()
        return _gathered([p for p in model.parameters() if hasattr(p, "ds_id")])

    def observe(self, model: nn.Module, optimizer: Any, reference: nn.Module | None = None) -> Any:
        self._engine, self._reference = model, reference
        self._find_layers(Root(self._engine.module))
        zero = self._engine.optimizer
        own = {id(p) for p in self._engine.module.parameters() if p.requires_grad}
        of_groups = zero.fp16_groups if self.shards_weights else zero.bit16_groups
        indices = [zero.sub_group_to_group_id[i] if self.shards_weights else i for i in range(len(of_groups))]
        groups = []
        for index, settings in enumerate(zero.optimizer.param_groups):
            members = [
                p for i, some in zip(indices, of_groups, strict=True) if i == index for p in some if id(p) in own
            ]
            groups.append({**settings, "params": members})
        self._trained = [parameter for group in groups for parameter in group["params"]]
        return self._optimizer(groups)

    def _find_layers(self, root: Root) -> None:
        layers = {id(m) for m in root.modules() if type(m).__name__ in root._no_split_modules}
        self._above_layers = {id(m) for m in root.modules() if any(id(c) in layers for c in m.modules() if c is not m)}

    def _optimizer(self, groups: list[dict[str, Any]]) -> ZeROOptimizer:
        self._parts = {id(parameter): self._part_of(parameter) for parameter in self._trained}
        masters = {parameter: self._parts[id(parameter)].master for parameter in self._trained}
        return ZeROOptimizer(self._engine, groups, self._flats(), masters, self._clear_gradients)

    def _flats(self) -> list[tuple[int, Tensor]]:
        """The tensors that the engine's optimizer trains on this process, with the index of their group."""
        zero = self._engine.optimizer
        if self.shards_weights:
            return [(zero.sub_group_to_group_id[i], flat) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
        return list(enumerate(zero.single_partition_of_fp32_groups))

    def _part_of(self, parameter: nn.Parameter) -> Part:
        if self.shards_weights:
            from deepspeed.utils import safe_get_local_fp32_param

            padded = safe_get_local_fp32_param(parameter)
            start = padded.numel() * distributed.get_rank()
            return Part(padded.narrow(0, 0, _within(padded.numel(), start, self.shape(parameter))), start)
        fragment: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:
            return Part(torch.empty(0, device=parameter.device), 0)
        return Part(fragment.hp_fragment, fragment.lp_fragment_address.start)

    def run(self, call: Callable[[], Result]) -> Result:
        return self._engine(call=call) if self.shards_weights else call()  # type: ignore[no-any-return]

    def run_reference(self, call: Callable[[], Result]) -> Result:
        return self.run(call) if self._reference is None else self._reference(call=call)  # type: ignore[no-any-return]

    def gathered(self, call: Callable[[], Result]) -> Result:
        if not self.shards_weights:
            return call()
        from deepspeed.runtime.zero import GatheredParameters

        _coordinator(self._engine)._clean_inflight_param_registry()
        with GatheredParameters(list(self._engine.module.parameters())):
            remove_hooks(self._engine)  # they would shard each module again after its pass
            try:
                return call()
            finally:
                add_hooks(self._engine)

    def holding(self, module: nn.Module) -> AbstractContextManager[None]:
        """As in `Replicated`, but of a module that contains layers only its own parameters are gathered: DeepSpeed gathers
        those of each module that it calls, and gives them up. What it has kept of them is given up at the end."""
        if not self.shards_weights:
            return nullcontext()
        _coordinator(self._engine)._clean_inflight_param_registry()
        if id(module) in self._above_layers:
            return _releasing(module.parameters(recurse=False), self._engine)
        if self._reference is not None and module is self._reference.module:
            return _releasing(module.parameters(recurse=False), self._reference)
        return _gathered(module.parameters())

    def accumulating(self, accelerator: Accelerator, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # accelerate's backward would make the step too

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        parts = [part.float() for p in parameters if (part := self._gradient(p)) is not None and part.numel()]
        norms = torch._foreach_norm(parts) if parts else [torch.zeros((), device=self._engine.device)]
        square = torch.stack(list(norms)).square().sum()
        distributed.all_reduce(square)
        norm = square.sqrt()
        self.scale_gradients(parameters, torch.clamp(limit / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: float | Tensor) -> None:
        for parameter in parameters:
            if (gradient := self._gradient(parameter)) is not None:
                gradient.mul_(factor)

    def _clear_gradients(self) -> None:
        for parameter in self._trained:
            if (gradient := self._gradient(parameter)) is not None:
                gradient.zero_()

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This process's part of the accumulated gradient, which may be written to; None before a backward pass."""
        if self.shards_weights:
            from deepspeed.utils import safe_get_local_grad

            padded: Tensor = safe_get_local_grad(parameter)
            return padded.narrow(0, 0, self._parts[id(parameter)].master.numel())
        fragment: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None or fragment.gradient_dict.get(fragment.param_group_index) is None:
            return None
        return fragment.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined, no-any-return]

    def local(self, tensor: Tensor) -> Tensor:
        part = self._parts.get(id(tensor))
        return tensor if part is None else part.master

    def written(self) -> None:
        """Round the weights of the passes from those in float32."""
        zero = self._engine.optimizer
        if not self.shards_weights:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    @torch.no_grad()
    def complete(self, tensor: Tensor, like: Tensor) -> Tensor:
        found = self._complete(tensor, like)
        return found.detach().cpu() if self._saves else found.new_empty(0, device="cpu")

    def _complete(self, tensor: Tensor, like: Tensor) -> Tensor:
        part = self._parts.get(id(like))
        if part is None:  # it is not trained
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([tensor]):
                return tensor.detach().clone()
        mine = part.master if tensor is like else tensor
        if mine.shape != part.master.shape:  # the count of steps, of which each parameter gets its own in a file
            return tensor.clone()
        shape = self.shape(like)
        found = mine.new_zeros(shape.numel())
        found[part.start : part.start + mine.numel()] = mine
        distributed.all_reduce(found)  # each element is of one process
        return found.view(shape)

    @torch.no_grad()
    def part(self, complete: Tensor, like: Tensor) -> Tensor:
        part = self._parts.get(id(like))
        if part is None or complete.shape != self.shape(like):
            return complete
        return complete.flatten()[part.start : part.start + part.master.numel()].to(part.master.device, copy=True)


@contextmanager
def _gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """All values of these parameters; those that are gathered already stay so afterwards."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
    with GatheredParameters(missing, enabled=bool(missing)):
        yield


def _coordinator(engine: Any) -> Any:
    """What gathers modules ahead of their passes, in the order of the passes before. What it has not finished gathering cannot
    be gathered otherwise, and passes that its trainer does not make must not become a part of this order."""
    zero = engine.optimizer
    return getattr(zero, "parameter_offload", zero).get_param_coordinator()


@contextmanager
def _releasing(parameters: Iterable[Any], engine: Any) -> Iterator[None]:
    """All values of these parameters; at the end, whatever was gathered of the engine's model is given up."""
    try:
        with _gathered(parameters):
            yield
    finally:
        coordinator = _coordinator(engine)
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        coordinator.release_and_reset_all(engine.module)


def _within(count: int, start: int, shape: torch.Size) -> int:
    """How many of `count` elements from `start` on a tensor of this shape has; a part may be padded."""
    return max(0, min(count, shape.numel() - start))


def _use_heads_in(root: nn.Module, models: nn.Module) -> None:
    """Let passes of `root` gather the output heads of language models in `models`, which are also called outside of a pass of
    these models."""
    from deepspeed.runtime.zero import register_external_parameter

    for model in models.modules():
        if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
            for parameter in head.parameters():
                register_external_parameter(root, parameter)


@torch.no_grad()
def complete_model(model: nn.Module) -> None:
    """Give each process all weights of a model that transformers has sharded for stage 3 while loading it."""
    sharded = {id(p): p for p in model.parameters() if hasattr(p, "ds_id")}
    if not sharded:
        return
    from deepspeed.runtime.zero import GatheredParameters

    complete = {}
    for key, parameter in sharded.items():
        with GatheredParameters([parameter]):
            complete[key] = nn.Parameter(parameter.cpu().clone(), requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in complete:
                module._parameters[name] = complete[id(weight)]
