"""Whether an optimizer rescales gradients is found by trial, for every class."""

from __future__ import annotations

import copy
import json

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from torch import nn, optim

from trl_trustkl.trust import gradient_scale
from trl_trustkl.trust.gradient_scale import KNOWN, GradientScale, rescales_gradients


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


@pytest.fixture(params=["known", "tried"])
def of_classes(request, monkeypatch) -> None:
    """With the classes that are known, and with a trial of these too."""
    if request.param == "tried":
        monkeypatch.setattr(gradient_scale, "KNOWN", {})


@pytest.mark.usefixtures("of_classes")
@pytest.mark.parametrize("name", PROPORTIONAL)
def test_optimizers_whose_steps_are_proportional_to_the_gradient(name):
    assert not rescales_gradients(PROPORTIONAL[name](parameters()))


@pytest.mark.usefixtures("of_classes")
@pytest.mark.parametrize("name", RESCALING)
def test_optimizers_that_rescale_gradients_or_cannot_be_tried(name):
    assert rescales_gradients(RESCALING[name](parameters()))


def test_what_is_known_is_what_a_trial_finds():
    for make, rescales in KNOWN.items():
        assert gradient_scale._tried_to_rescale(make(parameters(), lr=0.1)) == rescales


def test_a_subclass_of_a_known_class_is_tried():
    class Normalised(optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad /= p.grad.norm()
            return super().step(closure)

    assert rescales_gradients(Normalised(parameters(), lr=0.1))


@pytest.mark.parametrize(("make", "rescales"), [(optim.SGD, False), (optim.AdamW, True)])
def test_an_optimizer_that_accelerate_wrapped(make, rescales):
    assert rescales_gradients(Accelerator(cpu=True).prepare(make(parameters(), lr=0.1))) == rescales


@pytest.mark.usefixtures("of_classes")
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


# -- the scale of the gradients so far ---------------------------------------------------------------------------------


def test_the_factor_is_the_quotient_of_the_root_mean_squares():
    scale = GradientScale()
    assert scale.factor == 1.0
    scale.add([1.0, 2.0], 1.0)
    assert scale.factor == pytest.approx(((0.999 + 1.0) / (0.999 + 4.0)) ** 0.5, rel=1e-12)
    scale.add([0.5], 1.0)
    after, before = 0.999 * (0.999 + 1.0) + 0.25, 0.999 * (0.999 + 4.0) + 0.25
    assert scale.factor == pytest.approx((after / before) ** 0.5, rel=1e-12)
    assert 0.5 < scale.factor < 1.0


@pytest.mark.parametrize("limit", [None, 10.0])
def test_gradients_that_were_not_clipped_have_the_factor_1(limit):
    scale = GradientScale()
    scale.add([1.0, 2.0, 0.0], limit)
    assert scale.factor == 1.0


def test_the_factor_is_restored_from_a_checkpoint():
    scale, other = GradientScale(), GradientScale()
    scale.add([1.0, 2.0], 0.1)
    other.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert other.factor == scale.factor
    scale.add([3.0], 0.1)
    other.add([3.0], 0.1)
    assert other.factor == scale.factor


def test_with_the_factor_a_step_of_adam_is_as_long_as_in_a_run_without_a_limit():
    """In every step the gradient has the same norm, so that clipping multiplies each by the same factor."""
    limited, free = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    runs = [(each, optim.AdamW([each], lr=0.1, eps=1e-30)) for each in (limited, free)]
    scale, generator = GradientScale(), torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(4, generator=generator, dtype=torch.float64)
        gradient *= 7.0 / gradient.norm()
        for (parameter, optimizer), factor in zip(runs, (0.3 / 7.0, 1.0), strict=True):
            parameter.grad = factor * gradient
            optimizer.step()
        scale.add([7.0], 0.3)
    gradient = torch.randn(4, generator=generator, dtype=torch.float64)
    for (parameter, optimizer), factor in zip(runs, (scale.factor, 1.0), strict=True):
        parameter.grad = factor * gradient
        optimizer.step()
    torch.testing.assert_close(limited, free, rtol=1e-12, atol=0)
