"""The shorter backward pass of RMSNorm: the layer's own numbers and autograd's gradients, for the layers that it knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests import tiny
from trl_trustkl.policy import rms_norm


def layer_and_input(dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = LlamaRMSNorm(24, eps=1e-3).to(weight_dtype)
    nn.init.normal_(layer.weight, mean=1.0, std=0.3)
    return layer, torch.randn(3, 5, 24).to(dtype) * 3


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_result_and_gradients_are_those_of_the_layer(dtype, weight_dtype):
    """The result bit for bit; the gradients up to rounding, which in bf16 is that of the terms of a sum."""
    layer, x = layer_and_input(dtype, weight_dtype)
    layers, found = rms_norm.plain_layers(layer), []
    assert layers == [layer]
    for some in ([], layers):
        given = x.clone().requires_grad_()
        with rms_norm.short_backward(some):
            result = layer(given)
            assert ("_RMSNorm" in type(result.grad_fn).__name__) is bool(some)
        weighted = (result.float() * torch.linspace(-1, 1, 24)).sum()
        found.append((result, *torch.autograd.grad(weighted, [given, layer.weight])))
    assert torch.equal(found[0][0], found[1][0])
    for theirs, ours in zip(found[0][1:], found[1][1:], strict=True):
        assert theirs.dtype == ours.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (theirs.float() - ours.float()).norm() < tolerance * theirs.float().norm()


def test_the_gradient_is_that_of_finite_differences():
    layer, x = layer_and_input(torch.float32, torch.float32)
    x, direction = x[0, :1].clone(), torch.randn(1, 24)
    given = x.clone().requires_grad_()
    with rms_norm.short_backward([layer]):
        gradient = torch.autograd.grad(layer(given).square().sum(), given)[0]

    def double(y: torch.Tensor) -> torch.Tensor:
        scale = (y.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        return (y * scale * layer.weight.detach().double()).square().sum()

    step = 1e-5 * direction.double()
    slope = (double(x.double() + step) - double(x.double() - step)) / 2e-5
    torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_a_layer_of_another_formula_is_left_alone():
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.5

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

    gemma = Gemma3RMSNorm(24)
    nn.init.normal_(gemma.weight)
    others = [gemma, OtherRMSNorm(24), GatedRMSNorm(24), nn.LayerNorm(24), LlamaRMSNorm(24).to("meta")]
    assert rms_norm.plain_layers(nn.ModuleList(others)) == []
    changed = LlamaRMSNorm(24)
    changed.forward = lambda x: x
    assert rms_norm.plain_layers(changed) == []


def test_the_context_leaves_the_layers_and_passes_without_gradients_as_they_are():
    layer, _ = layer_and_input(torch.float32, torch.float32)
    with torch.no_grad(), rms_norm.short_backward([layer]):
        assert "forward" not in vars(layer)
    with pytest.raises(KeyError), rms_norm.short_backward([layer]), rms_norm.short_backward([layer]):
        assert "forward" in vars(layer)
        raise KeyError
    assert "forward" not in vars(layer)


def test_all_norms_of_llama_are_found():
    assert len(rms_norm.plain_layers(tiny.llama())) == 2 * tiny.llama().config.num_hidden_layers + 1
