"""Quantized models: their detection, and the inverse of bitsandbytes' packing of 4-bit weights."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny, windows
from trl_trustkl.policy.quantization import dequantised, dequantised_dtype, is_quantized, unpack_4bit_weights


def four_bit_layers(model) -> list:
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


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
    layers = four_bit_layers(model)
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


def by_definition(weight) -> torch.Tensor:
    """NF4: two codes of the table in each byte, the first in the high bits, times the scale of their block."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:  # the scales are 8-bit codes with scales, around their mean
        codes, inner = scales.long().view(-1), state.state2
        blocks = torch.arange(codes.numel()) // inner.blocksize
        scales = inner.code[codes] * inner.absmax[blocks] + state.offset
    data = weight.data.view(torch.uint8).view(-1)
    codes = torch.stack([data >> 4, data & 15], dim=1).view(-1, state.blocksize).long()
    return (state.code[codes] * scales[:, None]).view(state.shape)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double quantization"])
def test_4_bit_weights_are_dequantised_by_their_definition(tmp_path, double):
    for layer in four_bit_layers(tiny.four_bit(tmp_path, double=double)):
        assert dequantised_dtype(layer, "weight") == torch.float32
        torch.testing.assert_close(dequantised(layer), by_definition(layer.weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double quantization"])
def test_packed_weights_are_dequantised_as_after_unpacking_and_stay_packed(tmp_path, double):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = tiny.four_bit(tmp_path, double=double)
    layers = four_bit_layers(model)
    for layer in layers:
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    before = [(each.weight.data.clone(), each.weight.quant_state.absmax.clone()) for each in layers]
    found = [dequantised(layer) for layer in layers]
    for layer, (data, scales) in zip(layers, before, strict=True):
        assert dequantised_dtype(layer, "weight") == torch.float32
        assert torch.equal(layer.weight.data, data) and torch.equal(layer.weight.quant_state.absmax, scales)
        assert layer.weight.quant_state.packing_format_for_cpu and not layer.weight.quant_state.nested
    unpack_4bit_weights(model)
    for layer, weight in zip(layers, found, strict=True):
        torch.testing.assert_close(weight, by_definition(layer.weight), rtol=1e-6, atol=1e-7)


def test_modules_without_quantised_weights_have_none_to_dequantise():
    model = tiny.llama().bfloat16()
    assert all(dequantised(each) is None for each in model.modules())
    for each in model.modules():
        for name, _ in each.named_parameters(recurse=False):
            assert dequantised_dtype(each, name) == torch.bfloat16


class Evaluates(TrainerCallback):
    """Leaves the model as a forward pass in eval mode leaves it on a CPU that computes with packed weights."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        model.eval()
        for layer in four_bit_layers(model):
            weight = layer.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_an_evaluation_by_a_callback_does_not_stop_the_adapter_from_learning(kind, tmp_path):
    """In one step from B = 0, the gradient of most adapters comes through the 4-bit weights alone."""
    model = tiny.four_bit(tmp_path / "model")
    if kind == "ppo":
        trainer = tiny.trainer(
            tmp_path / "run", model, changes={"max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
        )
    else:
        trainer = windows.limited(kind, tmp_path / "run", model=model, max_steps=1, max_kl=1.0)
    trainer.callback_handler.callbacks.insert(0, Evaluates())
    adapter = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    before = {name: p.detach().clone() for name, p in adapter.items()}
    trainer.train()
    assert before and [name for name, p in adapter.items() if torch.equal(p, before[name])] == []
