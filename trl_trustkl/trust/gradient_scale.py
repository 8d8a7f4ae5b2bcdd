"""Whether an optimizer's steps depend on the scale of the gradients."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..run import rng

STEPS = 20
"""Steps of a trial. RAdam, for example, rescales gradients only from its sixth step on."""


def rescales_gradients(optimizer: Any) -> bool:
    """Whether the optimizer rescales gradients, as Adam does by dividing them by a running mean of their size, so that a
    factor on all gradients, such as that of `max_grad_norm`, is no measure of its effect on the steps.

    This is tried: two new optimizers of the same class and settings, without weight decay, get the same gradients, one of them
    at half the scale. If its steps are half as long, as with SGD, gradients are not rescaled. An optimizer that cannot be
    tried counts as one that rescales them.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
    with warnings.catch_warnings(), rng.seeded(torch.device("cpu"), 0):
        warnings.simplefilter("ignore")
        try:
            full, half = (_displacement(optimizer, scale) for scale in (1.0, 0.5))
        except Exception:  # whatever a class from elsewhere raises
            return True
    return not torch.allclose(half, 0.5 * full, rtol=1e-3)


def _displacement(optimizer: Any, scale: float) -> Tensor:
    """How far a parameter moves in some steps of a new optimizer of the same class."""
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name in accepted}
    settings |= {"lr": 0.01} | ({"weight_decay": 0.0} if "weight_decay" in accepted else {})
    parameter = nn.Parameter(torch.zeros(4))
    trial = type(optimizer)(**settings | {"params": [parameter]})
    gradients = torch.randn(STEPS, 4, generator=torch.Generator().manual_seed(0))
    for gradient in gradients:
        parameter.grad = scale * gradient
        trial.step()
    return parameter.detach()
