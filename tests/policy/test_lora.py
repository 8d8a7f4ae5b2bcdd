"""The shorter forward pass of LoRA layers: PEFT's numbers, and models that are left unchanged."""

from __future__ import annotations

import copy
import pickle

import torch
from peft import get_peft_model
from torch import nn

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
