"""Exact divergences from the trainer's own passes against a dense float64 computation from the models' own logits."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests import tiny
from trl_trustkl.policy import lora
from trl_trustkl.rollout.transformers_engine import Sampler


def dense_logps(model, micro, temperature: float) -> torch.Tensor:
    """log π over the vocabulary at each response position, [b, t, V], from the model's whole forward pass, in float64."""
    with torch.no_grad():
        logits = model(
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, position_ids=micro.position_ids
        ).logits
    first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
    return (logits[:, first:-1].double() / temperature).log_softmax(-1)


def dense_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def four_bit(tmp_path, seed: int = 0):
    """A tiny Llama with NF4 weights that computes in float32."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny.llama(seed, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "full")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return LlamaForCausalLM.from_pretrained(tmp_path / "full", quantization_config=quantization)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "4-bit"])
def test_exact_divergences_equal_a_dense_float64_computation(family, tmp_path):
    model = four_bit(tmp_path) if family == "4-bit" else tiny.FAMILIES[family]()
    changes = {"temperature": 0.7, "learning_rate": 0.05}
    trainer = tiny.trainer(tmp_path / "run", model, changes=changes)
    assert trainer.model.split_lm.chunked
    trainer._loop.begin()
    seen = []
    for update in range(2):
        scored = trainer.score(trainer.rollout(trainer.next_prompts()))
        policy = trainer.model.policy
        old = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        with policy.disable_adapter():
            reference = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        for micro, p, q in zip(scored.micro_batches, old, reference, strict=True):
            mine = scored.ref_kl[micro.rows, : micro.response_ids.shape[1]]
            torch.testing.assert_close(mine.double(), dense_kl(p, q) * micro.response_mask, atol=1e-5, rtol=0)
            entropy = scored.entropy[micro.rows, : micro.response_ids.shape[1]]
            torch.testing.assert_close(
                entropy.double(), -(p.exp() * p).sum(-1) * micro.response_mask, atol=1e-5, rtol=0
            )
        batch = trainer.advantages(scored)
        trainer.optimise(batch)
        measured = trainer.measure(batch)
        new = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        masks = [micro.response_mask for micro in scored.micro_batches]
        kls = torch.cat([dense_kl(p, n)[m] for p, n, m in zip(old, new, masks, strict=True)])
        tvs = torch.cat([0.5 * (p.exp() - n.exp()).abs().sum(-1)[m] for p, n, m in zip(old, new, masks, strict=True)])
        log_ratios = torch.cat(
            [
                (n - p).gather(-1, micro.response_ids.unsqueeze(-1)).squeeze(-1)[micro.response_mask]
                for p, n, micro in zip(old, new, scored.micro_batches, strict=True)
            ]
        )
        assert measured.kl == pytest.approx(float(kls.mean()), abs=1e-5)
        assert measured.kl_max == pytest.approx(float(kls.max()), abs=1e-5)
        assert measured.tv == pytest.approx(float(tvs.mean()), abs=1e-5)
        assert measured.max_ratio == pytest.approx(float(log_ratios.max().exp()), rel=1e-4)
        median = float(log_ratios.quantile(0.5).exp())
        assert measured.ratio_quantiles["0.5"] == pytest.approx(median, rel=1e-4)
        seen.append(measured.kl)
        trainer.state.global_step = update + 1
    assert max(seen) > 1e-3, "the policy must have moved, or nothing was compared"


def test_a_model_whose_logits_are_not_head_times_hidden_falls_back_and_says_so(tmp_path, caplog):
    class Shifted(type(tiny.llama())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5 + torch.arange(out.logits.shape[-1]) * 0.01
            return out

    model = Shifted(tiny.llama().config)
    model.load_state_dict(tiny.llama().state_dict())
    trainer = tiny.trainer(tmp_path, model)
    assert not trainer.model.split_lm.chunked
    assert "falls back" in caplog.text or "whole forward pass" in caplog.text
    trainer._loop.begin()
    scored = trainer.score(trainer.rollout(trainer.next_prompts()))
    p = dense_logps(trainer.model.policy, scored.micro_batches[0], 1.0)
    expected = -(p.exp() * p).sum(-1) * scored.micro_batches[0].response_mask
    mine = scored.entropy[scored.micro_batches[0].rows, : expected.shape[1]]
    torch.testing.assert_close(mine.double(), expected, atol=1e-5, rtol=0)


def test_a_soft_cap_that_is_left_out_would_be_noticed():
    model = tiny.gemma2()
    from trl_trustkl.policy.split_lm import SplitLM

    assert SplitLM(model).chunked
    uncapped = copy.deepcopy(model)
    uncapped.config.final_logit_softcapping = None
    hidden = torch.randn(3, model.config.hidden_size)
    capped = SplitLM(model).head(hidden)
    assert capped.abs().max() <= 2.0
    assert (SplitLM(uncapped).head(hidden) - capped).abs().max() > 1e-2


def test_the_shorter_pass_of_a_lora_layer_gives_the_numbers_of_pefts():
    """In float32, and up to rounding under bf16 autocast; with the adapter off or merged they are PEFT's own."""
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


def test_sampling_draws_from_the_distribution_and_never_a_token_of_probability_zero():
    torch.manual_seed(0)
    logits = 2 * torch.randn(tiny.VOCAB)
    logits[5] = -math.inf
    sampler, count = Sampler(), 100_000
    token = sampler(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    expected = logits.double().softmax(-1) * count
    found = torch.bincount(token, minlength=tiny.VOCAB).double()
    alive = expected > 0
    chi2 = ((found - expected).square() / expected)[alive].sum()
    assert found[5] == 0 and chi2 < 90  # 41 degrees of freedom: 90 is beyond one in 10,000
    torch.testing.assert_close(sampler.columns[0], logits.log_softmax(-1)[token])
