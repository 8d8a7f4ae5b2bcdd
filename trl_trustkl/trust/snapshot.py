"""Where an update began, and the path from there to where it ended."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ParameterPath:
    """The segment from θ_old to θ of some parameters, in their own precision: `set_scale(a)` moves them along it.

    Scale 0 restores θ_old bit for bit, scale 1 the θ that the parameters had at the last call of `set_end`, or at the first
    of `set_scale` where there was none.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.start = [p.detach().clone() for p in self.parameters]
        self.end: list[Tensor] | None = None

    def set_end(self) -> None:
        """Take the parameters as they are now for θ."""
        self.end = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Put the parameters at θ_old + scale·(θ − θ_old)."""
        if self.end is None:
            self.set_end()
        assert self.end is not None
        for parameter, start, end in zip(self.parameters, self.start, self.end, strict=True):
            if scale == 0.0:
                parameter.copy_(start)
            elif scale == 1.0:
                parameter.copy_(end)
            else:
                parameter.copy_(torch.lerp(start, end, scale))

    def restore(self) -> None:
        """Put the parameters back at θ_old, whatever they are now."""
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.copy_(start)


class UpdateSnapshot:
    """Where an update began: the trained parameters, and the state of their optimizer.

    The optimizer's tensors are kept in host memory, so that full fine-tuning needs no more of the GPU's; the parameters
    stay beside the model, where backtracking reads them. A gradient scaler is left out: that it backs off is how it works.

    Args:
        trained: the policy's parameters, which `path` moves.
        others: further parameters that `restore` puts back, such as the value's.
        optimizer: of all of them.
    """

    def __init__(self, trained: Sequence[nn.Parameter], others: Sequence[nn.Parameter], optimizer: Any) -> None:
        self.path = ParameterPath(trained)
        self._others = ParameterPath(others)
        self._optimizer = optimizer
        self._covered = covered = {*trained, *others}
        self._state = {
            parameter: {name: _copied(entry) for name, entry in state.items()}
            for parameter, state in optimizer.state.items()
            if parameter in covered
        }
        self._groups = [
            {name: copy.deepcopy(entry) for name, entry in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        self.path.restore()
        self._others.restore()
        for parameter in list(self._optimizer.state):
            if parameter in self._covered and parameter not in self._state:
                del self._optimizer.state[parameter]
        for parameter, saved in self._state.items():
            state = self._optimizer.state[parameter]
            for name in state.keys() - saved.keys():
                del state[name]
            for name, entry in saved.items():
                if isinstance(entry, Tensor):
                    with torch.no_grad():
                        state[name].copy_(entry)
                else:
                    state[name] = copy.deepcopy(entry)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings)
        self._optimizer.zero_grad()


def _copied(entry: Any) -> Any:
    return entry.detach().to("cpu", copy=True) if isinstance(entry, Tensor) else copy.deepcopy(entry)
