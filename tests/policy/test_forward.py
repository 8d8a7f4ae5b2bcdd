"""Forward passes without gradients, under the autocast of training."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.watched import watched
from trl_trustkl.policy.forward import ForwardPass
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.policy.value_head import PolicyAndValue
from trl_trustkl.types import PolicySnapshot, Rollout

pytestmark = pytest.mark.filterwarnings("ignore")


def test_bf16_is_in_effect_in_every_forward_pass(tmp_path):
    trainer = watched(tmp_path, changes={"bf16": True, "max_steps": 1})
    dtypes = set()
    trainer.model.policy.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert trainer.accelerator.mixed_precision == "bf16"


def rollout() -> Rollout:
    """Two prompts with a response of three tokens and one of two."""
    prompt_mask = torch.tensor([[False, True], [True, True]])
    response_mask = torch.tensor([[True, True, True], [True, True, False]])
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    return Rollout(ids[:, :2], prompt_mask, ids[:, 2:], response_mask)


def test_a_pass_for_scoring_and_one_for_comparing_give_what_each_needs():
    micro, model = micro_batch(rollout(), torch.arange(2)), PolicyAndValue(tiny.llama(), None, temperature=0.7)
    nn.init.normal_(model.value.linear.weight)
    other = PolicyAndValue(tiny.llama(seed=1), None, temperature=0.7)
    forward = ForwardPass(model, contextlib.nullcontext)
    reference = PolicySnapshot(other(micro).hidden, other.split_lm.frozen_head())
    scored, compared = forward.score(micro, reference), forward.compare(micro, reference)
    assert not any(each.requires_grad for each in (*scored, *compared) if each is not None)
    p, q = (dense_logps(each.policy, micro, 0.7) for each in (model, other))
    for out in (scored, compared):
        wanted = p.gather(-1, micro.response_ids.unsqueeze(-1)).squeeze(-1) * micro.response_mask
        torch.testing.assert_close(out.logp.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.ref_kl.double(), dense_kl(p, q) * micro.response_mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(compared.old_kl.double(), dense_kl(q, p) * micro.response_mask, rtol=0, atol=1e-5)
    assert scored.values.shape == (2, 4) and scored.values.any() and not compared.values.any()
    assert scored.entropy is not None and scored.old_kl is None
    assert compared.entropy is None and compared.ref_kl is None and compared.old_tv is not None


def test_every_pass_runs_under_the_autocast_that_was_given():
    micro, model = micro_batch(rollout(), torch.arange(2)), PolicyAndValue(tiny.llama(), None, temperature=1.0)
    dtypes = []
    model.policy.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    forward = ForwardPass(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    snapshot = PolicySnapshot(model(micro).hidden, model.split_lm.frozen_head())
    forward.score(micro, snapshot)
    forward.compare(micro, snapshot)
    assert dtypes[-3:] == [torch.float32, torch.bfloat16, torch.bfloat16]
