"""A language model in two halves: backbone and output head."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import families, tiny
from tests.dense import dense_logps
from tests.watched import run, watched
from trl_trustkl.errors import ModelError
from trl_trustkl.policy import lora
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.split_lm import SplitLM

pytestmark = pytest.mark.filterwarnings("ignore")


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
    assert "complete forward pass" in caplog.text
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


def test_a_soft_cap_by_an_unknown_name_is_noticed_while_logits_are_small():
    class Capped(type(tiny.llama())):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            return out

    model = Capped(tiny.llama(initializer_range=0.05).config)
    model.load_state_dict(tiny.llama(initializer_range=0.05).state_dict())
    ids = torch.arange(1, 5)[None]
    plain = super(Capped, model).forward(input_ids=ids).logits
    assert plain.abs().max() > 0.5 and (model(input_ids=ids).logits - plain).abs().max() < 1e-3
    assert not SplitLM(model).chunked


def patched(model: Any) -> Any:
    """The model with a forward pass assigned to its head, as TRL does for `cast_lm_head_to_fp32`."""
    head = model.lm_head
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight.float(), head.bias)
    return model


@pytest.mark.parametrize(
    "build",
    [tiny.llama, lambda: patched(tiny.llama()), lambda: tiny.tuned(target_modules=["lm_head"])],
    ids=["plain", "patched", "adapter"],
)
def test_a_frozen_head_keeps_the_weights_of_its_time(build):
    lm, hidden = SplitLM(model := build()), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    frozen = lm.frozen_head()
    before = lm.head(hidden).detach()
    torch.testing.assert_close(frozen(hidden), before, atol=0, rtol=0)
    with torch.no_grad():
        for weight in trainable(model):
            weight.mul_(1.5)
    assert not torch.allclose(lm.head(hidden), before)
    torch.testing.assert_close(frozen(hidden), before, atol=0, rtol=0)
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_noise_that_cannot_be_switched_off_is_rejected(tmp_path):
    with pytest.raises(ModelError, match="two passes over the same tokens differ"):
        tiny.trainer(tmp_path, families.build("Falcon", **families.NOISE["Falcon"]), peft_config=None)


def test_no_forward_pass_keeps_all_hidden_states_or_logits_of_the_entire_rollout(tmp_path, monkeypatch):
    trainer = watched(tmp_path, changes={"max_steps": 1})
    asked = set()
    for module in (trainer.model.split_lm.backbone, trainer.model.split_lm.causal):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: asked.add(bool(kwargs.get("output_hidden_states"))), with_kwargs=True
        )
    trainer.train()
    assert asked == {False}
    assert not any(tiny.VOCAB in tensor.shape for tensor in tensors(trainer.seen["advantages"][0]))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in the output of a phase."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def test_there_are_tensors_to_find(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 1})
    assert len(tensors(trainer.seen["advantages"][0])) > 20


def test_shards_are_read_in_their_layers_alone():
    """A layer's weights may be gathered only within the layer; the shorter pass reads those of all adapters before."""
    lm = SplitLM(tiny.tuned())
    inputs = {"input_ids": torch.arange(3, 9).unsqueeze(0), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    layers = lora.linear_layers(lm.causal)
    read, forward = [], type(layers[0]).forward

    def noted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(layer)
        return forward(layer, *args, **kwargs)

    with mock.patch.object(type(layers[0]), "forward", noted):
        before = lm.hidden(inputs, 0)[0]
        assert not read
        lm.adapt_to_shards()
        after = lm.hidden(inputs, 0)[0]
    assert len(read) == len(layers) > 5
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_sharded_head_is_called_without_its_hooks(frozen):
    """An engine's hooks expect the same calls in every process, and a head is called once for each chunk of tokens."""
    lm, states, called = SplitLM(tiny.llama()), torch.randn(5, 32), []
    lm.causal.lm_head.register_forward_hook(lambda *_: called.append("hook"))
    before = lm.head(states)
    assert called == ["hook"]
    lm.adapt_to_shards()
    head = lm.frozen_head() if frozen else lm.head
    assert torch.equal(head(states), before) and called == ["hook"]
    assert [p.shape for p in head.parameters()] == [lm.causal.lm_head.weight.shape]


def test_weights_that_are_nan_are_named_as_the_cause(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="are NaN: its weights are damaged"):
        tiny.trainer(tmp_path, model)
