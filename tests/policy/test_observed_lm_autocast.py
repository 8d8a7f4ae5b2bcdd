"""Measuring under autocast while the weights change, as a limit does that shortens an update."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32

from tests import tiny
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.observed_lm import ObservedLM
from trl_trustkl.policy.reference import Reference
from trl_trustkl.types import MicroBatch, PolicySnapshot

BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def micro_batch() -> MicroBatch:
    ids = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    return MicroBatch(
        rows=torch.arange(3), input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=None,
        response_ids=ids[:, 4:], response_mask=torch.ones(3, 5, dtype=torch.bool),
    )  # fmt: skip


def observed(model: Any) -> ObservedLM:
    return ObservedLM(model.train(), autocast=BF16, temperature=1.0)


def prepared(model: Any) -> Any:
    """The model as accelerate prepares it for bf16: its own forward pass enters autocast as well."""
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(BF16()(model.forward))
    return model


@pytest.mark.parametrize("build", [tiny.llama, tiny.tuned, tiny.gemma2], ids=["full", "lora", "tied"])
def test_weights_that_change_between_two_passes_are_the_ones_measured(build):
    lm, micro = observed(build()), micro_batch()
    prepared(lm.model)
    weights = trainable(lm.model)
    start = [weight.detach().clone() for weight in weights]

    def kl(scale: float) -> float:
        with torch.no_grad():
            for weight, at_start in zip(weights, start, strict=True):
                weight.copy_(at_start * (1 + 0.3 * scale))
        return float(lm.compare(micro, old).old_kl.mean())

    with lm.without_noise():
        old = PolicySnapshot(lm.hidden_states(micro), lm.frozen_head())
    expected = []
    for scale in (1.0, 0.5, 0.0):
        with lm.without_noise():
            expected.append(kl(scale))
    with lm.without_noise():
        found = [kl(scale) for scale in (1.0, 0.5, 0.0)]
    assert found == expected
    assert expected[0] > expected[1] > expected[2] == 0.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_and_a_copy_that_accelerate_prepared_are_equal(family):
    policy, reference = tiny.FAMILIES[family](), prepared(tiny.FAMILIES[family]())
    lm, ref_lm, micro = observed(policy), observed(reference), micro_batch()
    assert lm.chunked and ref_lm.chunked
    prepared(policy)
    reference.eval()
    with lm.without_noise():
        old = PolicySnapshot(lm.hidden_states(micro), lm.frozen_head())
        snapshot = Reference(policy, lm, reference, ref_lm=ref_lm).snapshot(micro)
        assert float(lm.to_reference(micro, old, snapshot).ref_kl.max()) == 0.0
