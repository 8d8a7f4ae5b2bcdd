"""The state before an update, and the path from it to the state after the update."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.sharding import REPLICATED, Replicated

STAGED_BYTES = 2**26
"""The GPU memory that a snapshot of the optimizer's state uses for a moment."""


class ParameterPath:
    """The segment from θ_old to θ of some parameters, in their precision.

    Scale 0 restores θ_old bit for bit, and scale 1 restores θ: the parameters at the last call of `set_end`, or at the
    first call of `set_scale` if `set_end` was never called. `written` is called after each change of the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], written: Callable[[], None] = lambda: None) -> None:
        self.parameters = list(parameters)
        self._written = written
        self.start = _copies(self.parameters)
        self.end: list[Tensor] = []

    def set_end(self) -> None:
        """Make the current parameters θ."""
        self.end = _copies(self.parameters)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the parameters to θ_old + scale·(θ − θ_old)."""
        if not self.end:
            self.set_end()
        if scale == 0.0:  # exactly, even if θ is not finite
            self.restore()
            return
        if scale == 1.0:
            _copy(self.parameters, self.end)
        else:
            _copy(self.parameters, self.start)  # then in place, without memory for a third copy
            for places in _same_kind(self.parameters):
                parameters, end = ([each[place] for place in places] for each in (self.parameters, self.end))
                torch._foreach_lerp_(parameters, end, scale)
        self._written()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to θ_old."""
        _copy(self.parameters, self.start)
        self._written()


class UpdateSnapshot:
    """The trained parameters and the state of their optimizer before an update.

    The optimizer's tensors are kept in host memory, so that full fine-tuning needs no additional GPU memory for them; the
    parameters stay on their device, where backtracking reads them. A gradient scaler is not included, since reducing its
    scale is part of its function.

    Args:
        trained: the policy's parameters, which `path` moves.
        others: further parameters that `restore` restores, such as the value's.
        optimizer: the optimizer of all of them.
        sharding: how the parameters are spread over processes. Each process copies its part of them.
    """

    def __init__(
        self,
        trained: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        optimizer: Any,
        sharding: Replicated = REPLICATED,
    ) -> None:
        self._local = local = sharding.local
        self.path = ParameterPath([local(p) for p in trained], sharding.written)
        self._others = ParameterPath([local(p) for p in others], sharding.written)
        self._optimizer = optimizer
        self._covered = {*trained, *others}
        states = {p: state for p, state in optimizer.state.items() if p in self._covered}
        tensors = [local(e) for state in states.values() for e in state.values() if isinstance(e, Tensor)]
        copies = iter(_on_host(tensors))
        self._state = {
            parameter: {
                name: next(copies) if isinstance(entry, Tensor) else copy.deepcopy(entry)
                for name, entry in state.items()
            }
            for parameter, state in states.items()
        }
        self._remake = {
            (parameter, name): sharding.remake(entry)
            for parameter in self._state
            for name, entry in optimizer.state[parameter].items()
            if isinstance(entry, Tensor)
        }
        self._groups = [
            {name: copy.deepcopy(entry) for name, entry in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything bit for bit, and clear the gradients."""
        self.path.restore()
        self._others.restore()
        for parameter in self._covered & (self._optimizer.state.keys() - self._state.keys()):
            del self._optimizer.state[parameter]
        for parameter, saved in self._state.items():
            state = self._optimizer.state[parameter]
            for name in state.keys() - saved.keys():
                del state[name]
            for name, entry in saved.items():
                if not isinstance(entry, Tensor):
                    state[name] = copy.deepcopy(entry)
                elif name in state:
                    self._local(state[name]).copy_(entry)
                else:  # it was made since, and removed by another snapshot
                    state[name] = self._remake[parameter, name](entry)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings)
        self._optimizer.zero_grad()


def _same_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of the tensors of each device and dtype: all of these are processed by one launch of a kernel."""
    found: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, each in enumerate(tensors):
        found[each.device, each.dtype].append(place)
    return list(found.values())


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, of the same dtype."""
    for places in _same_kind(targets):
        torch._foreach_copy_([targets[place] for place in places], [sources[place] for place in places])


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(each, requires_grad=False) for each in tensors]
    _copy(copies, tensors)
    return copies


@torch.no_grad()
def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in host memory. Small tensors of a device and dtype are moved together: each transfer waits for the GPU."""
    copies = [each if _moves_together(each) else each.detach().to("cpu", copy=True) for each in tensors]
    small = [place for place, each in enumerate(tensors) if _moves_together(each)]
    for places in _same_kind([tensors[place] for place in small]):
        for group in _up_to(STAGED_BYTES, [small[place] for place in places], tensors):
            flat = torch.cat([tensors[place].detach().flatten() for place in group]).cpu()
            parts = flat.split([tensors[place].numel() for place in group])
            for place, part in zip(group, parts, strict=True):
                copies[place] = part.view(tensors[place].shape)
    return copies


def _moves_together(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and tensor.nbytes < STAGED_BYTES


def _up_to(limit: int, places: Sequence[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places in groups whose tensors have at most `limit` bytes."""
    groups: list[list[int]] = []
    taken = 0
    for place in places:
        taken += tensors[place].nbytes
        if not groups or taken > limit:
            groups.append([])
            taken = tensors[place].nbytes
        groups[-1].append(place)
    return groups
