"""The state before an update, and the path from it to the state after the update."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ParameterPath:
    """The segment from θ_old to θ of some parameters, in their precision.

    Scale 0 restores θ_old bit for bit, and scale 1 restores θ: the parameters at the last call of `set_end`, or at the
    first call of `set_scale` if `set_end` was never called.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.start = [p.detach().clone() for p in self.parameters]
        self.end: list[Tensor] = []

    def set_end(self) -> None:
        """Make the current parameters θ."""
        self.end = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the parameters to θ_old + scale·(θ − θ_old)."""
        if not self.end:
            self.set_end()
        if scale == 0.0:  # exactly, even if θ is not finite
            self.restore()
            return
        for parameter, start, end in zip(self.parameters, self.start, self.end, strict=True):
            parameter.copy_(end if scale == 1.0 else torch.lerp(start, end, scale))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to θ_old."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.copy_(start)


class UpdateSnapshot:
    """The trained parameters and the state of their optimizer before an update.

    The optimizer's tensors are kept in host memory, so that full fine-tuning needs no additional GPU memory for them; the
    parameters stay on their device, where backtracking reads them. A gradient scaler is not included, since reducing its
    scale is part of its function.

    Args:
        trained: the policy's parameters, which `path` moves.
        others: further parameters that `restore` restores, such as the value's.
        optimizer: the optimizer of all of them.
    """

    def __init__(self, trained: Sequence[nn.Parameter], others: Sequence[nn.Parameter], optimizer: Any) -> None:
        self.path = ParameterPath(trained)
        self._others = ParameterPath(others)
        self._optimizer = optimizer
        self._covered = {*trained, *others}
        self._state = {
            parameter: {name: _copied(entry) for name, entry in state.items()}
            for parameter, state in optimizer.state.items()
            if parameter in self._covered
        }
        self._devices = {
            (parameter, name): entry.device
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
                    state[name].copy_(entry)
                else:  # it was made since, and removed by another snapshot
                    state[name] = entry.to(self._devices[parameter, name], copy=True)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings)
        self._optimizer.zero_grad()


def _copied(entry: Any) -> Any:
    return entry.detach().to("cpu", copy=True) if isinstance(entry, Tensor) else copy.deepcopy(entry)
