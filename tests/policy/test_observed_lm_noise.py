"""Noise that a trainer adds to the model after the measurement was set up."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from tests import tiny
from trl_trustkl.policy.observed_lm import ObservedLM
from trl_trustkl.types import MicroBatch


def test_noise_that_is_added_when_training_begins_is_off_while_measuring():
    ids = torch.arange(3, 15).reshape(2, 6)
    micro = MicroBatch(
        rows=torch.arange(2), input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=None,
        response_ids=ids[:, 3:], response_mask=torch.ones(2, 3, dtype=torch.bool),
    )  # fmt: skip
    lm = ObservedLM(tiny.llama().train(), autocast=nullcontext, temperature=1.0)
    with lm.without_noise():
        expected = lm.hidden_states(micro)
    embeddings = lm.model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5
    embeddings.register_forward_hook(neftune_post_forward_hook)
    lm.watch()
    with torch.no_grad():
        assert not torch.equal(lm.hidden_states(micro), expected)
    with lm.without_noise():
        assert torch.equal(lm.hidden_states(micro), expected)
    assert embeddings.neftune_noise_alpha == 5
