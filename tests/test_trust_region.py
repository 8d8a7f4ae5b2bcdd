"""The public module of the trust region: its names, and their use in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trl_trustkl import trust_region
from trl_trustkl.trust import backtracking, snapshot
from trl_trustkl.trust import measurement as measuring


def test_the_module_exposes_the_parts_of_the_trust_region():
    assert sorted(trust_region.__all__) == ["Backtrack", "ParameterPath", "QUANTILES", "backtrack", "measurement"]
    assert trust_region.backtrack is backtracking.backtrack and trust_region.Backtrack is backtracking.Backtrack
    assert trust_region.measurement is measuring.measurement and trust_region.QUANTILES is measuring.QUANTILES
    assert trust_region.ParameterPath is snapshot.ParameterPath


@pytest.mark.parametrize("limit", [1e-2, 1e-4])
def test_a_step_of_plain_torch_is_shortened_to_the_limit(limit):
    torch.manual_seed(0)
    policy, features = nn.Linear(6, 9), torch.randn(4, 5, 6)
    tokens, mask = torch.randint(9, (4, 5)), torch.ones(4, 5, dtype=torch.bool)

    def logps() -> Tensor:
        return policy(features).log_softmax(-1)

    old = logps().detach()

    def measure() -> float:
        with torch.no_grad():
            new = logps()
        kl, tv = (old.exp() * (old - new)).sum(-1), (old.exp() - new.exp()).abs().sum(-1) / 2
        ratio = (new - old).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return trust_region.measurement(kl, tv, ratio, mask, complete=True).kl

    path = trust_region.ParameterPath(list(policy.parameters()))
    loss = -logps().gather(-1, tokens.unsqueeze(-1)).mean()
    loss.backward()
    torch.optim.SGD(policy.parameters(), lr=3.0).step()
    assert measure() > 2 * limit
    found = trust_region.backtrack(path.set_scale, measure, limit)
    assert 0 < found.scale < 1 and 0.5 * limit < found.measured <= limit
    assert measure() == found.measured
