"""Whether an optimizer's steps depend on the scale of the gradients, and the scale that they had so far."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..run import rng

KNOWN = {torch.optim.SGD: False, torch.optim.Adam: True, torch.optim.AdamW: True}
"""Classes that most runs use, which are not tried."""
STEPS = 20
"""Steps of a trial. RAdam, for example, rescales gradients only from its sixth step on."""


def rescales_gradients(optimizer: Any) -> bool:
    """Whether the optimizer rescales gradients, as Adam does by dividing them by a running mean of their size, so that a
    factor on all gradients, such as that of `max_grad_norm`, does not measure its effect on the steps.

    For classes other than `KNOWN` this is tried: two new optimizers of the same class and settings, without weight decay, get
    the same gradients, one of them at half the scale. If its steps are half as long, as with SGD, gradients are not rescaled.
    An optimizer that cannot be tried counts as one that rescales them.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
    if (known := KNOWN.get(type(optimizer))) is not None:
        return known
    return _tried_to_rescale(optimizer)


def _tried_to_rescale(optimizer: Any) -> bool:
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


MEMORY = 0.999
"""The weight of a step, relative to the step after it, in the scale of the gradients so far: that in Adam's second moment."""


class GradientScale:
    """The factor by which a limit on the norm has scaled the gradients of the steps so far: the root mean square of the norms
    after clipping, divided by that of the norms before.

    An optimizer that rescales gradients holds a running mean of their size after clipping. A gradient that is not clipped is
    comparable to it after multiplication with this factor.
    """

    def __init__(self) -> None:
        self._before = self._after = 0.0

    def add(self, norms: Iterable[float], limit: float | None) -> None:
        """Add the gradient norms of some steps before clipping, and the limit that they were clipped to."""
        for norm in norms:
            clipped = norm if limit is None else min(norm, limit)
            self._before = MEMORY * self._before + norm**2
            self._after = MEMORY * self._after + clipped**2

    @property
    def factor(self) -> float:
        """1 before the first step."""
        return math.sqrt(self._after / self._before) if self._before else 1.0

    def state_dict(self) -> list[float]:
        return [self._before, self._after]

    def load_state_dict(self, state: list[float]) -> None:
        self._before, self._after = state
