"""The optimizer of flat partitions, by the parameters of the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_trustkl.parallel.zero_optimizer import ZeROOptimizer

SIZES = [(3, 2), (4,), (1,)]
KINDS = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


class Engine:
    """An engine with the partitions of one process: the first two parameters in one, of which the second has a part, and the
    third, of another group, in another one. An empty group was removed."""

    def __init__(self, kind: Any, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(size)) for size in SIZES]
        first, second, third = (p.detach() for p in self.parameters)
        self.flats = [nn.Parameter(torch.cat([first.flatten(), second[:2]])), nn.Parameter(third.clone())]
        groups = [{"params": [flat], "lr": lr} for flat, lr in zip(self.flats, (0.1, 0.2), strict=True)]
        inner = kind(groups, **settings)
        self.optimizer = SimpleNamespace(optimizer=inner)
        self.step = inner.step
        given = [self.parameters[:2], [], self.parameters[2:]]
        self.groups = [
            {**inner.param_groups[0], "params": parameters, "lr": lr}
            for parameters, lr in zip(given, (0.1, 7.0, 0.2), strict=True)
        ]
        flat = self.flats[0].detach()
        self.masters = dict(zip(self.parameters, (flat[:6], flat[6:], self.flats[1].detach()), strict=True))
        self.cleared = 0

    def made(self) -> ZeROOptimizer:
        def clear() -> None:
            self.cleared += 1

        return ZeROOptimizer(self, self.groups, list(enumerate(self.flats)), self.masters, clear)


def stepped(optimizer: ZeROOptimizer, engine: Engine, count: int) -> None:
    for step in range(count):
        for flat in engine.flats:
            flat.grad = torch.full_like(flat, 1.0 + step)
        optimizer.step()


def copied(optimizer: ZeROOptimizer) -> list[Tensor]:
    return [entry.clone() for state in optimizer.state.values() for entry in state.values()]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_steps_and_moments_are_those_of_the_parameters_alone(kind: Any, settings: dict[str, Any]) -> None:
    engine = Engine(kind, settings)
    optimizer = engine.made()
    alone = [nn.Parameter(master.clone()) for master in engine.masters.values()]
    expected = kind([{"params": alone[:2], "lr": 0.1}, {"params": alone[2:], "lr": 0.05}], **settings)
    optimizer.param_groups[2]["lr"] = 0.05  # as a schedule does
    stepped(optimizer, engine, 3)
    for step in range(3):
        for weight in alone:
            weight.grad = torch.full_like(weight, 1.0 + step)
        expected.step()
    for mine, weight, parameter in zip(engine.masters.values(), alone, engine.parameters, strict=True):
        torch.testing.assert_close(mine, weight.detach())
        assert optimizer.state[parameter].keys() == expected.state[weight].keys()
        for name, entry in expected.state[weight].items():
            torch.testing.assert_close(optimizer.state[parameter][name], entry)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_moments_exist_before_the_first_step_and_nothing_else_changes(kind: Any, settings: dict[str, Any]) -> None:
    engine = Engine(kind, settings)
    before = [flat.detach().clone() for flat in engine.flats]
    optimizer = engine.made()
    assert len(copied(optimizer)) > 2 and not any(entry.any() for entry in copied(optimizer))
    for flat, weight in zip(engine.flats, before, strict=True):
        assert torch.equal(flat, weight) and flat.grad is None
    rates = [group["lr"] for group in engine.optimizer.optimizer.param_groups]
    assert rates == [0.1, 0.2] and [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 1]


def test_a_parameter_of_another_process_has_empty_moments() -> None:
    engine = Engine(*KINDS[0])
    engine.masters[engine.parameters[1]] = torch.empty(0)
    state = engine.made().state[engine.parameters[1]]
    assert {name: entry.numel() for name, entry in state.items()} == {"step": 1, "exp_avg": 0, "exp_avg_sq": 0}


def test_a_loaded_state_is_the_saved_one_in_the_same_memory() -> None:
    engine = Engine(*KINDS[0])
    optimizer = engine.made()
    stepped(optimizer, engine, 2)
    optimizer.param_groups[0]["lr"] = 0.3
    saved, moments = copy.deepcopy(optimizer.state_dict()), copied(optimizer)
    places = [entry.data_ptr() for state in optimizer.state.values() for entry in state.values()]
    stepped(optimizer, engine, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert all(map(torch.equal, copied(optimizer), moments))
    assert places == [entry.data_ptr() for state in optimizer.state.values() for entry in state.values()]
    optimizer.load_state_dict(saved | {"state": {}})
    assert not any(entry.any() for entry in copied(optimizer))


def test_gradients_are_removed_by_the_engine() -> None:
    engine = Engine(*KINDS[0])
    engine.made().zero_grad()
    assert engine.cleared == 1
