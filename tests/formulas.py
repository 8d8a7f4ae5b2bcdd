"""The textbook definition of each divergence, independent of the formulas of the package, and random distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trl_trustkl.divergences import ESTIMATORS


class Definition(NamedTuple):
    """Without control variates and without numerical safeguards.

    sample: one sample of the estimator from u = q/p at the sampled token, any shape. expectation: the mean of the samples
    under p, from the distributions p and q [V]. Both take the order; divergences without an order ignore it.
    """

    sample: Callable[[Tensor, float], Tensor]
    expectation: Callable[[Tensor, Tensor, float], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


DEFINITIONS: dict[str, Definition] = {
    "k1": Definition(lambda u, _: -u.log(), lambda p, q, _: kl(p, q)),
    "k2": Definition(lambda u, _: u.log() ** 2 / 2, lambda p, q, _: (p * (p / q).log() ** 2).sum() / 2),
    "k3": Definition(lambda u, _: u - 1 - u.log(), lambda p, q, _: kl(p, q)),
    "abs": Definition(lambda u, _: u.log().abs(), lambda p, q, _: (p * (p / q).log().abs()).sum()),
    "forward_kl": Definition(lambda u, _: u * u.log() - (u - 1), lambda p, q, _: kl(q, p)),
    "js": Definition(
        lambda u, _: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2,
        lambda p, q, _: js(p, q),
    ),
    "tv": Definition(lambda u, _: (u - 1).abs() / 2, lambda p, q, _: (p - q).abs().sum() / 2),
    "hellinger": Definition(lambda u, _: (u.sqrt() - 1) ** 2 / 2, lambda p, q, _: 1 - (p * q).sqrt().sum()),
    "chi2": Definition(lambda u, _: (u - 1) ** 2, lambda p, q, _: ((q - p) ** 2 / p).sum()),
    "alpha": Definition(
        lambda u, order: (u**order - order * u - (1 - order)) / (order * (order - 1)),
        lambda p, q, order: ((p ** (1 - order) * q**order).sum() - 1) / (order * (order - 1)),
    ),
}

EXPECTATIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    **{name: definition.expectation for name, definition in DEFINITIONS.items()},
    "kl": lambda p, q, _: kl(p, q),
    "renyi": lambda p, q, order: (p * (p / q) ** (order - 1)).sum().log() / (order - 1),
}

ALPHA_ORDERS = (0.5, 2.0, -1.0, 0.1, 3.0, 0.999)
ESTIMATOR_CASES = [(name, {}) for name in ESTIMATORS] + [("alpha", {"order": a}) for a in ALPHA_ORDERS]
"""Each estimator with options."""


def dirichlet(seed: int, size: int, vocab: int, concentration: float = 0.7) -> np.ndarray:
    """Distributions [size, vocab] without a zero."""
    draw = np.random.default_rng(seed).dirichlet(np.full(vocab, concentration), size=size)
    return (draw + 1e-6) / (draw + 1e-6).sum(-1, keepdims=True)


def sample(name: str, log_u: Tensor, order: float = 0.5) -> Tensor:
    """One sample of the estimator `name`, in float64."""
    return DEFINITIONS[name].sample(log_u.double().exp(), order)


def expectation(name: str, p: Tensor, q: Tensor, order: float = 0.5) -> float:
    """The divergence `name` between two distributions [V], in float64."""
    return float(EXPECTATIONS[name](torch.as_tensor(p).double(), torch.as_tensor(q).double(), order))
