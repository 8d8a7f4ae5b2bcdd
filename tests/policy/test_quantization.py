"""Quantized models: their detection, and the inverse of bitsandbytes' packing of 4-bit weights."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from trl_trustkl.policy.quantization import is_quantized, unpack_4bit_weights


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_a_quantized_model_is_one_that_was_loaded_so(flag):
    model = tiny.llama()
    assert not is_quantized(model)
    setattr(model, flag, True)
    assert is_quantized(model) is True


def test_a_model_in_4_bits_is_quantized(tmp_path):
    assert is_quantized(tiny.four_bit(tmp_path))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double quantization"])
def test_packed_weights_are_unpacked(tmp_path, double):
    """The weights bit for bit; packing rounds their scales to bf16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = tiny.four_bit(tmp_path, double=double).train()
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    before = [layer.weight.data.clone() for layer in layers]
    ids = torch.arange(1, 7).unsqueeze(0)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    for layer in layers[::2]:
        weight = layer.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert not all(map(torch.equal, [layer.weight.data for layer in layers], before)), "nothing was packed"
    unpack_4bit_weights(model)
    assert all(map(torch.equal, [layer.weight.data for layer in layers], before))
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0.1)


def test_weights_that_are_not_packed_stay_as_they_are(tmp_path):
    model = tiny.four_bit(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unpack_4bit_weights(model)
    assert before and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
