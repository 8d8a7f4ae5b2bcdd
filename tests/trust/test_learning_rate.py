"""The learning rate of one update, changed without the schedule noticing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from trl_trustkl.errors import ConfigError
from trl_trustkl.trust.learning_rate import check_adaptable, scaled_learning_rate


def test_only_the_policys_rate_is_scaled_and_only_inside_the_context():
    first, second, value = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}, {"params": [value], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(RuntimeError, match="step"), scaled_learning_rate(optimizer, [first, second], 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.3]
        raise RuntimeError("step")
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]


def test_a_scheduler_that_acts_after_the_context_is_not_affected():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for factor, used, scheduled in ((2.0, 2.0, 0.5), (3.0, 1.5, 1 / 3)):
        with scaled_learning_rate(optimizer, [weight], factor):
            assert optimizer.param_groups[0]["lr"] == used
            optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduled)


def test_an_optimizer_that_finds_its_own_rate_cannot_be_adapted():
    weight = nn.Parameter(torch.zeros(2))
    check_adaptable(torch.optim.SGD([weight], lr=0.1), "lr_target")
    check_adaptable(Adafactor([weight], lr=0.1, relative_step=False), "lr_target")
    for optimizer in (Adafactor([weight], lr=None), Adafactor([weight], lr=None, relative_step=False)):
        with pytest.raises(
            ConfigError, match="`lr_target` adapts .*this Adafactor computes its own; give it a learning"
        ):
            check_adaptable(optimizer, "lr_target")
