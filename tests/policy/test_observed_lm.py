"""The hidden states of another trainer's passes, and of equal passes, against complete forward passes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.dense import dense_kl, dense_logps
from trl_trustkl.errors import ModelError
from trl_trustkl.policy.dropout import has_noise
from trl_trustkl.policy.exact_kl import token_statistics
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.observed_lm import ObservedLM
from trl_trustkl.types import MicroBatch, PolicySnapshot

pytestmark = pytest.mark.filterwarnings("ignore")
TEMPERATURE = 0.7


def observed(model: Any, **options: Any) -> ObservedLM:
    return ObservedLM(model, **{"autocast": nullcontext, "temperature": TEMPERATURE} | options)


def batch(seed: int = 0) -> MicroBatch:
    """Three rows as a trainer pads them: prompts on the left, completions on the right; one token does not count."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, tiny.VOCAB, (3, 4), generator=generator)
    ids = torch.randint(3, tiny.VOCAB, (3, 5), generator=generator)
    prompt_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    counts = mask.bool()
    counts[0, 2] = False
    return MicroBatch(
        rows=torch.arange(3), input_ids=torch.cat([prompts, ids], 1), position_ids=None,
        attention_mask=torch.cat([prompt_mask, mask], 1), response_ids=ids, response_mask=counts,
    )  # fmt: skip


def trained_pass(model: Any, micro: MicroBatch) -> Any:
    """A pass as that of a trainer, with gradients."""
    return model(input_ids=micro.input_ids, attention_mask=micro.attention_mask)


class Shifted(type(tiny.llama())):
    """A Llama whose logits are not its head applied to its states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1]) * 0.01
        return out


def shifted() -> Shifted:
    model = Shifted(tiny.llama().config)
    model.load_state_dict(tiny.llama().state_dict())
    return model


MODELS = {"llama": tiny.llama, "LoRA": tiny.tuned, "gpt2": tiny.gpt2, "gemma2": tiny.gemma2, "no head": shifted}


@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_is_that_of_complete_forward_passes(name):
    model, micro = MODELS[name]().train(), batch()
    lm = observed(model)
    assert lm.chunked == (name != "no head")
    with lm.without_noise():
        old = PolicySnapshot(lm.hidden_states(micro), lm.frozen_head())
        before = dense_logps(model, micro, TEMPERATURE)
        same = lm.compare(micro, old)
    assert same.old_kl.abs().max() == 0 and torch.equal(same.logp, same.old_logp)
    with torch.no_grad():
        for weight in trainable(model):
            weight.add_(0.02 * torch.randn(weight.shape))
    with lm.without_noise():
        found = lm.compare(micro, old)
        after = dense_logps(model, micro, TEMPERATURE)
    mask = micro.response_mask
    at = micro.response_ids.unsqueeze(-1)
    wanted = {
        "old_kl": dense_kl(before, after),
        "old_tv": (before.exp() - after.exp()).abs().sum(-1) / 2,
        "logp": after.gather(-1, at).squeeze(-1),
        "old_logp": before.gather(-1, at).squeeze(-1),
    }
    for column, expected in wanted.items():
        torch.testing.assert_close(getattr(found, column)[mask].double(), expected[mask], atol=2e-5, rtol=1e-4)
        assert not getattr(found, column)[~mask].any()
    assert found.old_kl.sum() > 1e-3
    with lm.without_noise():
        reference = PolicySnapshot(lm.hidden_states(micro), lm.frozen_head())
    anchor = lm.to_reference(micro, old, reference)
    torch.testing.assert_close(anchor.ref_kl[mask].double(), dense_kl(before, after)[mask], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(anchor.ref_logp, found.logp)


@pytest.mark.parametrize("virtual", [0, 3])
def test_states_of_training_are_those_of_the_trainers_pass_bit_for_bit(virtual):
    """`virtual`: tokens that precede the input, as a learned prompt adds them; the hook sees their states too."""
    model, micro = tiny.llama().train(), batch()
    lm = observed(model)
    stop = lm.watch()
    seen = micro._replace()
    if virtual:
        added = torch.randint(3, tiny.VOCAB, (3, virtual))
        seen = micro._replace(
            input_ids=torch.cat([added, micro.input_ids], 1),
            attention_mask=torch.cat([torch.ones_like(added), micro.attention_mask], 1),
        )
    logits = trained_pass(model, seen).logits[:, virtual:].detach()
    states = lm.states_of_training(micro)
    assert states.shape == (int(micro.response_mask.sum()), 32) and not states.requires_grad
    assert lm.states_of_training(micro) is None, "read twice"
    predicting = logits[:, 3:-1][micro.response_mask]
    torch.testing.assert_close(lm.head(states), predicting)
    if not virtual:
        with lm.without_noise():
            assert torch.equal(lm.hidden_states(micro), states)
    stop()
    trained_pass(model, micro)
    assert lm.states_of_training(micro) is None, "the hook is still there"


def test_states_of_a_pass_of_another_shape_or_without_gradients_are_not_used():
    model, micro = tiny.llama().train(), batch()
    lm = observed(model)
    lm.watch()
    trained_pass(model, micro._replace(input_ids=micro.input_ids[:2], attention_mask=micro.attention_mask[:2]))
    assert lm.states_of_training(micro) is None
    trained_pass(model, micro._replace(input_ids=micro.input_ids[:, 1:], attention_mask=micro.attention_mask[:, 1:]))
    assert lm.states_of_training(micro) is None
    with torch.no_grad():
        trained_pass(model, micro)
    assert lm.states_of_training(micro) is None
    with lm.without_noise():
        lm.hidden_states(micro)
    assert lm.states_of_training(micro) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_in_training_without_noise_and_as_before_afterwards(training):
    model = tiny.tuned(tiny.llama(attention_dropout=0.3), lora_dropout=0.2).train(training)
    lm, micro = observed(model), batch()
    assert has_noise(model), "the constructor left the dropout off"
    with lm.without_noise():
        assert model.training and not torch.is_grad_enabled() and not has_noise(model)
        assert torch.equal(lm.hidden_states(micro), lm.hidden_states(micro))
    assert model.training == training and torch.is_grad_enabled() and has_noise(model)


def test_passes_have_the_trainers_precision():
    model, micro = tiny.llama().train(), batch()
    lm = observed(model, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    exact = observed(model)
    lm.watch()
    with lm.autocast():
        trained_pass(model, micro)
    states = lm.states_of_training(micro)
    with lm.without_noise():
        again = lm.hidden_states(micro)
        assert torch.equal(again, states)
        assert lm.compare(micro, PolicySnapshot(states, lm.frozen_head())).old_kl.abs().max() == 0
    with exact.without_noise():
        assert not torch.equal(exact.hidden_states(micro), again)


def test_a_snapshot_of_the_head_does_not_change_with_the_model():
    model, micro = tiny.llama().train(), batch()
    lm = observed(model)
    with lm.without_noise():
        old = PolicySnapshot(lm.hidden_states(micro), lm.frozen_head())
        before = dense_logps(model, micro, TEMPERATURE)[micro.response_mask]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    targets = micro.response_ids[micro.response_mask]
    logp = token_statistics(old.hidden, targets, old.head, vocab_size=tiny.VOCAB, temperature=TEMPERATURE).logp
    torch.testing.assert_close(logp.double(), before.gather(-1, targets[:, None]).squeeze(-1), atol=2e-5, rtol=1e-4)


def test_only_one_position_of_logits_is_computed():
    model, micro = tiny.llama().train(), batch()
    lm, shapes = observed(model), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with lm.without_noise():
        lm.hidden_states(micro)
    assert shapes == [(3, 1, tiny.VOCAB)]


def test_a_model_whose_passes_are_random_without_dropout_is_an_error():
    class Noisy(type(tiny.llama())):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.rand(out.logits.shape)
            return out

    model = Noisy(tiny.llama().config).train()
    with pytest.raises(ModelError, match="two passes over the same tokens differ"):
        observed(model)


def test_no_gradient_reaches_the_model(small_chunks):
    model, micro = tiny.llama().train(), batch()
    lm = observed(model)
    with lm.without_noise():
        found = lm.compare(micro, PolicySnapshot(lm.hidden_states(micro), lm.frozen_head()))
    assert isinstance(found.old_kl, Tensor) and not found.old_kl.requires_grad and not found.logp.requires_grad
