"""Whether an optimizer rescales gradients is found by trial, for every class."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from torch import nn, optim

from trl_trustkl.trust.gradient_scale import rescales_gradients


class Sign(optim.Optimizer):
    """An optimizer of a name that says nothing: steps of a fixed length in the direction of the gradient's sign."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure=None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())


class Plain(Sign):
    """Gradient descent."""

    def step(self, closure=None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)


class Untried(Plain):
    """Its constructor needs an argument that its settings do not hold."""

    def __init__(self, params, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(params, lr)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 5))]


PROPORTIONAL = {
    "sgd": lambda p: optim.SGD(p, lr=1e-3),
    "momentum": lambda p: optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.1),
    "asgd": lambda p: optim.ASGD(p),
    "custom": Plain,
}
RESCALING = {
    "adam": lambda p: optim.Adam(p, eps=1e-5),
    "adamw": lambda p: optim.AdamW(p, fused=True),
    "radam": optim.RAdam,
    "adagrad": optim.Adagrad,
    "rmsprop": optim.RMSprop,
    "adafactor": optim.Adafactor,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "lion_8bit": bitsandbytes.optim.Lion8bit,
    "custom": Sign,
    "untried": lambda p: Untried(p, nn.Linear(1, 1)),
    "none": lambda p: None,
}


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_optimizers_whose_steps_are_proportional_to_the_gradient(name):
    assert not rescales_gradients(PROPORTIONAL[name](parameters()))


@pytest.mark.parametrize("name", RESCALING)
def test_optimizers_that_rescale_gradients_or_cannot_be_tried(name):
    assert rescales_gradients(RESCALING[name](parameters()))


@pytest.mark.parametrize(("make", "rescales"), [(optim.SGD, False), (optim.AdamW, True)])
def test_an_optimizer_that_accelerate_wrapped(make, rescales):
    assert rescales_gradients(Accelerator(cpu=True).prepare(make(parameters(), lr=0.1))) == rescales


@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw_8bit"])
def test_the_trial_changes_neither_the_optimizer_nor_the_random_state(name):
    params = parameters()
    optimizer = (PROPORTIONAL | RESCALING)[name](params)
    params[0].grad = torch.full((3, 5), 0.5)
    optimizer.step()
    before = copy.deepcopy([params[0].detach(), params[0].grad, optimizer.state_dict(), torch.get_rng_state()])
    rescales_gradients(optimizer)
    after = [params[0].detach(), params[0].grad, optimizer.state_dict(), torch.get_rng_state()]
    torch.testing.assert_close(before, after, rtol=0, atol=0)
