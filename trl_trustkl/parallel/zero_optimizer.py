"""The optimizer of a ZeRO engine, by the parameters of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .options import check_optimizer


class ZeROOptimizer(torch.optim.Optimizer):
    """The optimizer of a ZeRO engine, with the parameter groups that it had before.

    The engine's optimizer trains flat partitions of all parameters of a group. Here `state` has, for each parameter, this
    process's part of its moments, which shares memory with the engine's. The moments exist from the beginning, and are 0.

    `optimizer` is the engine's, of a class of PyTorch. ConfigError for another one.

    Args:
        engine: the DeepSpeed engine.
        groups: the parameter groups before the engine took the optimizer.
        flats: the flat partitions of this process, with the index of their group.
        masters: each parameter's part of a flat partition, as a view of it.
        clear: removes the gradients of the parameters.
    """

    def __init__(
        self,
        engine: Any,
        groups: Sequence[dict[str, Any]],
        flats: Sequence[tuple[int, Tensor]],
        masters: Mapping[nn.Parameter, Tensor],
        clear: Callable[[], None],
    ) -> None:
        super().__init__(groups, {})
        self._engine = engine
        self.optimizer = self._inner = engine.optimizer.optimizer
        check_optimizer(self.optimizer, "DeepSpeed")
        self._clear = clear
        _create_states(self._inner, flats)
        self._groups = [group for group in self.param_groups if group["params"]]  # DeepSpeed removes empty ones
        for index, group in enumerate(self._groups):
            mine = [flat for each, flat in flats if each == index]
            for parameter in group["params"]:
                self.state[parameter] = _parts(self._inner.state, mine, masters[parameter])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make a step with the settings of the groups, such as their learning rates."""
        for group, engines in zip(self._groups, self._inner.param_groups, strict=True):
            engines.update((name, entry) for name, entry in group.items() if name != "params")
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients."""
        self._clear()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the settings of the groups, and this process's parts of the moments in place."""
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update((name, entry) for name, entry in saved.items() if name != "params")
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            saved = state["state"].get(index, {})
            for name, entry in self.state[parameter].items():
                entry.copy_(saved[name]) if name in saved else entry.zero_()


def _create_states(optimizer: Any, flats: Sequence[tuple[int, Tensor]]) -> None:
    """Let the optimizer create its state as in its first step, by a step that changes nothing, and set it to 0. A state that it
    has, as after it was loaded, is kept."""
    for index, flat in flats:
        if optimizer.state.get(flat):
            continue
        group = optimizer.param_groups[index]
        kept = {"params": group["params"], "lr": group["lr"]}
        group.update(params=[flat], lr=0.0)
        flat.grad = torch.zeros_like(flat)
        optimizer.step()
        flat.grad = None
        group.update(kept)
        for entry in optimizer.state[flat].values():
            if isinstance(entry, Tensor):
                entry.zero_()


def _parts(states: Mapping[Tensor, dict[str, Any]], flats: Sequence[Tensor], master: Tensor) -> dict[str, Tensor]:
    """The parts of the moments that belong to `master`, a view of one of these partitions; the count of steps is the same
    for all parameters of a partition."""
    storage = master.untyped_storage().data_ptr()
    flat = next((each for each in flats if each.untyped_storage().data_ptr() == storage), flats[0])
    start = master.storage_offset() - flat.storage_offset() if master.numel() else 0
    return {
        name: entry.narrow(0, start, master.numel()) if entry.shape == flat.shape else entry
        for name, entry in states[flat].items()
        if isinstance(entry, Tensor)
    }
