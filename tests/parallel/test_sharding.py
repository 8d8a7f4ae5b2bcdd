"""Complete parameters are left as they are."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from trl_trustkl.parallel.sharding import REPLICATED


def test_complete_parameters_are_used_as_they_are() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    for same in (REPLICATED.local(weight), REPLICATED.complete(weight, weight), REPLICATED.part(weight, weight)):
        assert same.data_ptr() == weight.data_ptr() and torch.equal(same, weight)
    assert not REPLICATED.complete(weight, weight).requires_grad and REPLICATED.shape(weight) == (3, 2)
    assert not REPLICATED.sharded and not REPLICATED.shards_weights
    with REPLICATED.holding(nn.Linear(1, 1)):
        pass
    for call in (REPLICATED.run, REPLICATED.run_reference, REPLICATED.gathered):
        assert call(lambda: weight) is weight
    REPLICATED.written()


def test_a_complete_tensor_is_remade_from_a_copy() -> None:
    kept = torch.randn(3)
    made = REPLICATED.remake(torch.empty(3))(kept)
    assert torch.equal(made, kept) and made.data_ptr() != kept.data_ptr()


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_complete_gradients_are_clipped_to_the_norm_of_all(limit: float) -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    given = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    for weight, gradient in zip(weights, given, strict=True):
        weight.grad = gradient.clone()
    assert float(REPLICATED.clip(weights, limit)) == 5.0
    for weight, gradient in zip(weights, given, strict=True):
        torch.testing.assert_close(weight.grad, gradient * min(1.0, limit / 5.0))


def test_a_step_is_one_of_the_optimizer_with_gradients_of_all_micro_batches() -> None:
    accelerator, layer = Accelerator(cpu=True), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    for last in (False, True):
        with REPLICATED.accumulating(accelerator, layer, last=last):
            REPLICATED.backward(accelerator, layer(torch.tensor([1.0, 2.0])).sum())
    REPLICATED.scale_gradients([layer.weight, nn.Parameter(torch.zeros(1))], 0.5)
    REPLICATED.step(optimizer)
    torch.testing.assert_close(layer.weight.detach(), before - torch.tensor([[1.0, 2.0]]))
