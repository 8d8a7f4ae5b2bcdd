"""The weights of quantised policies: those of the training pass, by the names and in the shapes of the checkpoint."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GPT2Config, GPT2LMHeadModel

from tests import tiny
from tests.adapters import adapted, assert_plain_model_is, four_bit, logits, moved, pack, plain
from trl_trustkl.errors import ModelError
from trl_trustkl.policy.merged_weights import check_mergeable, merged_weights
from trl_trustkl.policy.quantization import dequantised, unpack_4bit_weights

pytestmark = pytest.mark.filterwarnings("ignore")

QUANTISED = {
    "plain": ({}, tiny.lora()),
    "double": ({"bnb_4bit_use_double_quant": True}, tiny.lora()),
    "DoRA": ({}, tiny.lora(use_dora=True)),
    "a bias of the adapter": ({}, tiny.lora(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "all biases": ({}, tiny.lora(bias="all")),
    "stored in bf16": ({"bnb_4bit_quant_storage": torch.bfloat16}, tiny.lora()),
}
if hasattr(BaseTunerLayer, "quantization_backend"):  # older versions of PEFT have classes for quantised weights
    OFT = OFTConfig(target_modules=["q_proj", "down_proj"], r=0, oft_block_size=8, task_type="CAUSAL_LM")
    QUANTISED["OFT"] = ({}, OFT)


@pytest.mark.parametrize("kind", QUANTISED)
def test_4_bit_weights_are_those_of_the_training_pass(tmp_path, kind):
    settings, config = QUANTISED[kind]
    policy = adapted(four_bit(tmp_path, **settings), config)
    assert_plain_model_is(policy, plain(tmp_path, policy), atol=2e-4)


def test_4_bit_weights_that_were_quantised_from_bf16_are_rounded_to_it_once(tmp_path):
    policy = adapted(four_bit(tmp_path, dtype=torch.bfloat16), tiny.lora())
    name = "model.layers.1.self_attn.v_proj"
    layer = policy.get_base_model().get_submodule(name)
    down, up = (each["default"].weight.detach().float() for each in (layer.lora_A, layer.lora_B))
    wanted = dequantised(layer.base_layer).float() + 2.0 * (up @ down)
    assert torch.equal(dict(merged_weights(policy))[f"{name}.weight"], wanted.bfloat16())
    assert torch.equal(dict(merged_weights(policy, torch.float32))[f"{name}.weight"], wanted)


def test_4_bit_weights_without_an_adapter_are_dequantised(tmp_path):
    policy = moved(four_bit(tmp_path))
    assert_plain_model_is(policy, type(policy).from_pretrained(tmp_path), atol=1e-5)


def test_a_4_bit_conv1d_has_the_shape_of_its_checkpoint(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=tiny.VOCAB, initializer_range=0.3))
    policy = adapted(four_bit(tmp_path, model), tiny.lora(target_modules=["c_attn"]))  # c_fc, c_proj: no adapter
    assert_plain_model_is(policy, plain(tmp_path, policy), atol=2e-4)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_packed_weights_are_those_of_training_after_they_are_unpacked(tmp_path, double):
    policy = adapted(four_bit(tmp_path, bnb_4bit_use_double_quant=double), tiny.lora())
    pack(policy)
    weights = dict(merged_weights(policy))
    unpack_4bit_weights(policy)
    again = dict(merged_weights(policy))
    assert all(torch.equal(weights[name], again[name]) for name in again)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert_plain_model_is(policy, plain(tmp_path, policy), atol=2e-4)


@pytest.mark.parametrize("passes", [0, 1])
def test_8_bit_weights_are_scaled_and_the_adapter_added(tmp_path, passes):
    policy = adapted(four_bit(tmp_path, load_in_4bit=False, load_in_8bit=True), tiny.lora())
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    layers = [policy.get_base_model().get_submodule(name) for name in names]
    scales = [layer.base_layer.weight.SCB.clone() for layer in layers]
    for _ in range(passes):  # the first pass moves the scales
        logits(policy)
    check_mergeable(policy)
    weights = dict(merged_weights(policy))
    for name, layer, scale in zip(names, layers, scales, strict=True):
        down, up = (each["default"].weight.detach() for each in (layer.lora_A, layer.lora_B))
        wanted = layer.base_layer.weight.float() * scale[:, None] / 127 + 2.0 * (up @ down)
        torch.testing.assert_close(weights[f"{name}.weight"], wanted, rtol=0, atol=1e-6)
    plain(tmp_path, policy).load_state_dict(weights)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_method_that_merges_only_into_quantised_weights_is_refused(tmp_path, bits):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    policy = adapted(four_bit(tmp_path, **{"load_in_4bit": False, bits: True}), config)
    with pytest.raises(ModelError, match=r"peft\.tuners\.ia3\.bnb\..*quantised weights"):
        check_mergeable(policy)
