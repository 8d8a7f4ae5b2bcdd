"""The shorter forward pass of LoRA layers: PEFT's numbers, and models that are left unchanged."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from trl_trustkl.policy import lora


def test_the_shorter_pass_of_a_lora_layer_gives_the_numbers_of_pefts():
    """In float32, and up to rounding under bf16 autocast; with the adapter off or merged, PEFT's pass runs."""
    for autocast in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), tiny.lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        short = copy.deepcopy(model)
        ids = torch.arange(1, 13).view(2, 6)
        results = []
        for each in (model, short):
            layers = lora.linear_layers(each) if each is short else []
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), lora.short_forward(layers):
                logits = each(input_ids=ids).logits
            logits.float().square().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])
            with each.disable_adapter(), torch.no_grad(), lora.short_forward(layers):
                results.append((logits.detach().float(), gradient, each(input_ids=ids).logits))
        for theirs, ours in zip(results[0][:2], results[1][:2], strict=True):
            assert (theirs - ours).norm() < (0.03 if autocast else 1e-5) * theirs.norm()
        assert torch.equal(results[0][2], results[1][2])
        assert not torch.allclose(results[0][0], results[0][2].float(), atol=0.1)
    assert layers and not any("forward" in vars(layer) for layer in layers)
    merged = copy.deepcopy(short)
    merged.merge_adapter()
    with lora.short_forward(lora.linear_layers(merged)):
        merged_logits = merged(input_ids=ids).logits
    with lora.short_forward(layers):
        torch.testing.assert_close(merged_logits, short(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def trained_lora(scaling: float = 2.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with an adapter whose second matrices are not 0."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), tiny.lora()).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for layer in lora.linear_layers(model):
        layer.scaling["default"] = scaling
    return model


IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_gradients_are_those_of_pefts_pass_in_float64_for_any_scaling(scaling):
    model = trained_lora(scaling, torch.float64)
    gradients = []
    for layers in ([], lora.linear_layers(model)):
        with lora.short_forward(layers):
            model(input_ids=IDS).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(gradients[0]) == 2 * len(lora.linear_layers(model)) and gradients[0].keys() == gradients[1].keys()
    for name, theirs in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], theirs, rtol=1e-10, atol=1e-12)


def test_an_adapter_that_is_not_trained_gets_no_gradient():
    model = trained_lora()
    frozen = [p for n, p in model.named_parameters() if "q_proj" in n and "lora_" in n]
    assert frozen
    for parameter in frozen:
        parameter.requires_grad_(False)
    with lora.short_forward(lora.linear_layers(model)):
        model(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for n, p in model.named_parameters() if "v_proj" in n and "lora_" in n)


class CastsOf(TorchDispatchMode):
    """Counts the casts of given tensors, one tensor at a time."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.places, self.count = {each.data_ptr() for each in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_no_layer_casts_the_weights_of_its_adapter_under_autocast(gradients):
    model = trained_lora()
    weights = [p for n, p in model.named_parameters() if "lora_" in n]
    counts = []
    for layers in ([], lora.linear_layers(model)):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        with torch.set_grad_enabled(gradients), autocast, CastsOf(weights) as casts, lora.short_forward(layers):
            model(input_ids=IDS)
        counts.append(casts.count)
    assert counts == [len(weights), 0]


@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_the_weights_of_the_pass_are_in_the_same_buffers_in_each_context(autocast):
    """Which are never the adapter's parameters."""
    model, buffers = trained_lora(), []
    layers, results = lora.linear_layers(model), []
    places = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with lora.short_forward(layers, buffers):
                results.append(model(input_ids=IDS).logits)
            with lora.short_forward(layers):
                assert torch.equal(results[-1], model(input_ids=IDS).logits)
            places.append([each.data_ptr() for each in buffers])
            for parameter in model.parameters():
                parameter.mul_(1.1 if parameter.requires_grad else 1.0)
    assert len(buffers) == 2 * len(layers) and places[0] == places[1]
    assert not {p.data_ptr() for p in model.parameters()} & set(places[0])
    assert not torch.equal(*results)


def test_a_trained_lora_policy_and_its_configuration_can_be_pickled(tmp_path):
    trainer = tiny.trainer(tmp_path / "run", changes={"max_steps": 1})
    trainer.train()
    policy = trainer.model.policy
    torch.save(policy, tmp_path / "policy.pt")
    copies = [pickle.loads(pickle.dumps(policy)), torch.load(tmp_path / "policy.pt", weights_only=False)]
    assert {type(module).__module__.split(".")[0] for module in policy.modules()} <= {"peft", "torch", "transformers"}
    for each in copies:
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), each.parameters(), strict=True))
        ids = torch.arange(1, 7).unsqueeze(0)
        assert torch.equal(each(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert pickle.loads(pickle.dumps(trainer.args)) == trainer.args
    torch.save(trainer.args, tmp_path / "args.pt")
    assert torch.load(tmp_path / "args.pt", weights_only=False) == trainer.args
