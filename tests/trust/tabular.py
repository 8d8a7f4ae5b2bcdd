"""A policy in plain torch, without a trainer: from features of N contexts to distributions over V tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trl_trustkl.trust.measurement import measurement
from trl_trustkl.trust.snapshot import UpdateSnapshot
from trl_trustkl.types import Measurement

CONTEXTS, FEATURES, VOCAB = (4, 6), 5, 11

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.2),
}


class Tabular:
    """A policy, its optimizer, and a batch of contexts with sampled tokens, some of which are masked."""

    def __init__(self, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(3)
        self.policy = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, VOCAB)).to(dtype)
        self.value = nn.Linear(FEATURES, 1).to(dtype)
        self.other = nn.Linear(FEATURES, 1).to(dtype)
        self.parameters = [*self.policy.parameters(), *self.value.parameters(), *self.other.parameters()]
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.features = torch.randn(*CONTEXTS, FEATURES, dtype=dtype)
        self.tokens = torch.randint(VOCAB, CONTEXTS)
        self.mask = torch.arange(CONTEXTS[1]) < torch.tensor([6, 2, 5, 1]).unsqueeze(-1)
        self.measured = 0

    def snapshot(self) -> UpdateSnapshot:
        """A snapshot of policy and value before an update; `other` is not covered."""
        self.old = copy.deepcopy(self.policy)
        return UpdateSnapshot(list(self.policy.parameters()), list(self.value.parameters()), self.optimizer)

    def step(self, size: float = 1.0) -> None:
        """One optimizer step that makes the sampled tokens more likely; a larger `size` goes further."""
        for group in self.optimizer.param_groups:
            group["lr"] *= size
        logps = self.policy(self.features).log_softmax(-1).gather(-1, self.tokens.unsqueeze(-1))
        loss = -logps.mean() + self.value(self.features).square().mean() + self.other(self.features).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] /= size

    def measure(self) -> Measurement:
        """The measurement that a trainer makes, in the policy's precision."""
        self.measured += 1
        with torch.no_grad():
            old, new = (model(self.features).log_softmax(-1) for model in (self.old, self.policy))
        ratio = (new - old).gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        kl = (old.exp() * (old - new)).sum(-1)
        tv = (old.exp() - new.exp()).abs().sum(-1) / 2
        return measurement(kl, tv, ratio, self.mask, complete=True)

    def dense_kl(self) -> float:
        """Mean KL(π_old‖π) of the contexts that count, in float64, by PyTorch's formula."""
        models = (copy.deepcopy(model).double().requires_grad_(False) for model in (self.old, self.policy))
        old, new = (model(self.features.double()) for model in models)
        kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (old, new)))
        return float(kl[self.mask].mean())

    def dense_kls(self) -> tuple[float, float, float]:
        """In float64: the mean KL(π_old‖π) of the contexts that count, the largest, and the largest sum over one row."""
        old, new = (copy.deepcopy(model).double()(self.features.double()) for model in (self.old, self.policy))
        logits = (each.detach() for each in (old, new))
        kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in logits)) * self.mask
        return float(kl[self.mask].mean()), float(kl.max()), float(kl.sum(1).max())

    @property
    def covered(self) -> list[nn.Parameter]:
        """The parameters that a snapshot covers."""
        return [*self.policy.parameters(), *self.value.parameters()]

    def everything(self) -> list[Any]:
        """A copy of all that a snapshot covers: the parameters, their optimizer state, and the optimizer's settings."""
        state = [self.optimizer.state.get(parameter, {}) for parameter in self.covered]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return [*copies(self.covered), *flat(state), *flat(settings)]


def copies(tensors: Any) -> list[Tensor]:
    return [each.detach().clone() for each in tensors]


def flat(states: list[dict[str, Any]]) -> list[Any]:
    """The entries of some states with their names, tensors copied."""
    return [
        (index, name, value.detach().clone() if isinstance(value, Tensor) else value)
        for index, state in enumerate(states)
        for name, value in state.items()
    ]


def same(one: Any, other: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other
