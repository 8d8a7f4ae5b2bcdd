"""Dropout and other noise of training, switched off and restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from trl_trustkl.policy.dropout import disable_dropout, has_noise, noise_places, without_dropout

RATES = {"p": 0.1, "attention_dropout": 0.2, "jitter_noise": 0.3, "layerdrop": 0.4, "hidden_dropout_prob": 0.5}


class Noisy(nn.Module):
    """Has rates of every kind, and numbers that are no rates of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.7  # of no dropout module
        self.attention_dropout = RATES["attention_dropout"]
        self.jitter_noise = RATES["jitter_noise"]
        self.layerdrop = RATES["layerdrop"]
        self.hidden_dropout_prob = RATES["hidden_dropout_prob"]
        self.resid_dropout = 0.0
        self.use_dropout = True
        self.eps = 1e-6
        self.inner = nn.ModuleDict({"dropout": nn.Dropout(RATES["p"]), "norm": nn.LayerNorm(3)})


def rates(model: nn.Module) -> dict[str, float]:
    """Those that are not 0."""
    found = {name: getattr(module, name) for module, name in noise_places(model)}
    return {name: rate for name, rate in found.items() if rate}


def test_every_rate_that_is_not_zero_is_found():
    model = Noisy()
    assert rates(model) == RATES
    assert {name: module for module, name in noise_places(model)}["p"] is model.inner["dropout"]


def test_disabling_sets_every_rate_to_zero_and_nothing_else():
    model = Noisy()
    disable_dropout(model)
    assert not has_noise(model)
    assert [getattr(model, name) for name in RATES if name != "p"] == [0.0] * 4 and model.inner["dropout"].p == 0.0
    assert (model.p, model.use_dropout, model.eps, model.inner["norm"].eps) == (0.7, True, 1e-6, 1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_without_dropout_restores_every_rate_also_after_an_error(fails):
    model = Noisy()
    try:
        with without_dropout(noise_places(model)):
            assert not has_noise(model)
            with without_dropout(noise_places(model)):  # nested, it changes nothing
                pass
            assert not has_noise(model)
            if fails:
                raise RuntimeError("a pass failed")
    except RuntimeError:
        assert fails
    assert rates(model) == RATES


def test_a_rate_that_changed_inside_is_restored_to_that_before():
    model = Noisy()
    with without_dropout(noise_places(model)):
        model.layerdrop = 0.9
    assert model.layerdrop == RATES["layerdrop"]


def test_passes_of_a_model_are_equal_without_dropout_and_differ_with_it():
    """Of attention, whose rate is read by the kernel, and of an adapter."""
    model = tiny.tuned(tiny.llama(attention_dropout=0.3), lora_dropout=0.2).train()
    ids = torch.arange(3, 15).unsqueeze(0)

    def logits() -> torch.Tensor:
        return model(input_ids=ids).logits

    for changed, kept in (({"attention_dropout": 0.3}, "p"), ({"p": 0.2}, "attention_dropout")):
        (name,) = changed
        for module, each in noise_places(model):
            if each == kept:
                setattr(module, each, 0.0)
        assert set(rates(model)) == {name}
        with without_dropout(noise_places(model)):
            assert torch.equal(logits(), logits())
        assert not torch.equal(logits(), logits()), f"{name} has no effect"
        model = tiny.tuned(tiny.llama(attention_dropout=0.3), lora_dropout=0.2).train()


def test_other_noise_is_switched_off_too():
    model = nn.Linear(2, 2)
    model.jitter_noise, model.layerdrop, model.neftune_noise_alpha, model.scale = 0.1, 0.2, 5, 0.5
    disable_dropout(model)
    assert (model.jitter_noise, model.layerdrop, model.neftune_noise_alpha, model.scale) == (0.0, 0.0, 0.0, 0.5)
