"""Trained weights before and after updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


def trained_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the weights of a module that are trained, by name."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the weights are equal bit for bit, under the same names in the same order."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class WatchWeights(TrainerCallback):
    """The trained weights before each update and after the last."""

    def __init__(self) -> None:
        self.snapshots: list[dict[str, Tensor]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.snapshots.append(trained_weights(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.snapshots.append(trained_weights(model))


def optimizer_state(optimizer: Any) -> list[Tensor]:
    """Copies of the tensors of an optimizer's state, in the order of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    return [entry.clone() for state in states for entry in state.values() if isinstance(entry, Tensor)]
