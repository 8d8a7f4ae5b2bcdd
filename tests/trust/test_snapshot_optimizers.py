"""A snapshot restores parameters and the states of PyTorch's optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_trustkl.trust.snapshot import UpdateSnapshot

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_a_starting_point_restores_parameters_and_optimizer_bit_for_bit(kind):
    policy, value = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    parameters = [*policy.parameters(), *value.parameters()]
    settings = {"SGD": {"momentum": 0.9}}.get(kind, {})
    optimizer = getattr(torch.optim, kind)(parameters, lr=0.1, **settings)

    def step() -> None:
        value(policy(torch.randn(5, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> list[Tensor]:
        entries = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return [*(p.detach().clone() for p in parameters), *(v.clone() for v in entries)]

    step()
    before = state()
    start = UpdateSnapshot(list(policy.parameters()), list(value.parameters()), optimizer)
    step()
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    start.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
