"""The trained weights of a module, and files of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..parallel.sharding import REPLICATED, Replicated


class TrainedWeights:
    """The trained weights of a module, by their names in memory."""

    def __init__(self, module: nn.Module, sharding: Replicated = REPLICATED) -> None:
        self._module = module
        self._sharding = sharding

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self._sharding.complete(p, p).contiguous() for name, p in self._parameters().items()}

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights bit for bit. CheckpointError if one is missing, or has another shape or dtype."""
        for name, parameter in self._parameters().items():
            if name not in weights:
                raise CheckpointError(f"it lacks trained weights of this model, such as {name!r}.")
            weight, local = weights[name], self._sharding.local
            shape, dtype = self._sharding.shape(parameter), local(parameter).dtype
            if weight.shape != shape or weight.dtype != dtype:
                raise CheckpointError(
                    f"it has {name!r} as {weight.dtype} {list(weight.shape)}; the model has it as {dtype} {list(shape)}."
                )
            with torch.no_grad():
                local(parameter).copy_(local(self._sharding.part(weight, parameter)))
        self._sharding.written()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._module.named_parameters() if p.requires_grad}


class ShardedOptimizer:
    """The state of an optimizer whose moments are sharded as the parameters are, in the format of a complete one."""

    def __init__(self, optimizer: Any, sharding: Replicated) -> None:
        self._optimizer = optimizer
        self._sharding = sharding

    def state_dict(self) -> dict[str, Any]:
        state, parameters = self._optimizer.state_dict(), self._parameters()

        def complete(index: int, tensor: Tensor) -> Tensor:
            return self._sharding.complete(tensor, parameters[index])

        return state | {"state": _each_tensor(state["state"], complete)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the process's part of each moment."""
        parameters = self._parameters()

        def part(index: int, tensor: Tensor) -> Tensor:
            return self._sharding.part(tensor, parameters[index])

        self._optimizer.load_state_dict(state | {"state": _each_tensor(state["state"], part)})

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def _each_tensor(states: dict[int, dict[str, Any]], change: Callable[[int, Tensor], Tensor]) -> dict[int, Any]:
    return {
        index: {name: change(index, entry) if isinstance(entry, Tensor) else entry for name, entry in state.items()}
        for index, state in states.items()
    }


class WeightsOnDisk(Mapping[str, Tensor]):
    """The weights of some safetensors files, each read on access."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths: dict[str, Path] = {}
        for path in paths:
            self._paths |= dict.fromkeys(names_in(path), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def names_in(path: Path) -> set[str]:
    """The names of the weights in a safetensors file; none if the file does not exist."""
    if not path.exists():
        return set()
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def count(module: nn.Module) -> int:
    """The number of trained parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
