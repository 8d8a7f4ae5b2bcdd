"""Probes of what a model computes."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from trl_trustkl.policy.probes import as_in_training, close, logits, token_ids


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ([1.0, -2.0], [1.0, -2.0], True),
        ([1.0, -2.01], [1.0, -2.0], True),
        ([1.0, -2.03], [1.0, -2.0], False),
        ([1.0, -math.inf], [1.0, -math.inf], True),
        ([1.03, -math.inf], [1.0, -math.inf], False),
        ([1.0, -2.0], [1.0, -math.inf], False),
        ([1.0, -math.inf], [1.0, -2.0], False),
        ([1.0, math.inf], [1.0, -math.inf], False),
        ([math.nan, 1.0], [math.nan, 1.0], False),
        ([-math.inf], [-math.inf], True),
    ],
)
def test_only_finite_entries_may_differ_and_by_the_tolerance_at_most(found, expected, same):
    assert close(torch.tensor(found), torch.tensor(expected), 0.01) is same


def test_the_logits_are_those_of_a_pass_in_training_and_the_mode_is_restored():
    model = tiny.llama().eval()
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    modes: list[bool] = []
    expected = model.train()(input_ids=torch.arange(1, 9)[None]).logits
    model.eval()
    found = logits(model)
    assert torch.equal(found, expected) and not found.requires_grad
    assert modes == [True, True] and not model.training


def test_token_ids_stay_within_the_vocabulary():
    assert token_ids(tiny.llama(vocab_size=5), 7).tolist() == [[1, 2, 3, 4, 0, 1, 2]]


def test_the_mode_is_restored_after_an_error():
    model = tiny.llama().eval()
    with pytest.raises(ValueError), as_in_training(model):
        assert model.training
        raise ValueError
    assert not model.training
