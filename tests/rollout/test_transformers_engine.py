"""Sampling with transformers, against the model's forward pass over one row at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, TEMPERATURE = 8, 0.7
STOPS = [2, 5, 11, 17, 23]
PROMPTS = [torch.arange(3, 3 + length) + 2 * i for i, length in enumerate([1, 5, 3, 2, 4, 1, 6, 2])]


def engine(model: Any = None, **changes: Any) -> TransformersEngine:
    settings = {
        "response_length": LENGTH,
        "temperature": TEMPERATURE,
        "stop_ids": STOPS,
        "pad_token_id": 0,
        "batch_size": 3,
        "autocast": contextlib.nullcontext,
    }
    return TransformersEngine(tiny.llama() if model is None else model, **settings | changes)


def dense_logps(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """log π over the vocabulary at each token of a response, [t, V], from a forward pass over only this row."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0]
    return (logits[len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)


def same(one: Samples, other: Samples) -> bool:
    """Whether two samples are equal bit for bit."""
    pairs = [pair for name in ("ids", "logps") for pair in zip(getattr(one, name), getattr(other, name), strict=True)]
    return one.finish_reasons == other.finish_reasons and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_responses_end_at_their_first_stop_token_or_at_the_length(family):
    found = engine(tiny.FAMILIES[family]().eval()).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert len(found.ids) == len(found.logps) == len(found.finish_reasons) == len(PROMPTS)
    for ids, logps, reason in zip(*found, strict=True):
        assert ids.shape == logps.shape and ids.dtype == torch.long
        stops = [position for position, token in enumerate(ids.tolist()) if token in STOPS]
        if reason == "stop":
            assert stops == [len(ids) - 1], "a response continues after a stop token, or stops without one"
        else:
            assert reason == "length" and stops == [] and len(ids) == LENGTH
    assert set(found.finish_reasons) == {"stop", "length"} and len({len(ids) for ids in found.ids}) > 2


def test_a_stop_token_at_the_last_position_counts_as_a_stop():
    always = engine(stop_ids=list(range(tiny.VOCAB)), response_length=1).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert always.finish_reasons == ["stop"] * len(PROMPTS) and all(len(ids) == 1 for ids in always.ids)


def test_without_a_stop_token_every_response_has_the_full_length():
    """The end of sequence of the model's generation config does not end a response."""
    found = engine(stop_ids=[], response_length=30).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert found.finish_reasons == ["length"] * len(PROMPTS) and {len(ids) for ids in found.ids} == {30}
    assert any(2 in ids for ids in found.ids), "no end of sequence was sampled"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_log_probabilities_are_the_models_own_at_the_temperature(family):
    model = tiny.FAMILIES[family]().eval()
    found = engine(model).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
        wanted = dense_logps(model, prompt, ids).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)


def test_log_probabilities_of_filtered_sampling_are_those_of_the_filtered_distribution():
    model = tiny.llama()
    found = engine(model, generation_kwargs={"top_k": 3}).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
        dense = dense_logps(model, prompt, ids)
        top = dense.topk(3, dim=-1)
        assert (top.indices == ids.unsqueeze(-1)).any(-1).all()
        wanted = dense.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - top.values.logsumexp(-1)
        torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)


def test_samples_depend_only_on_the_seed():
    one, other = engine(), engine()
    first = one.generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert same(one.generate(PROMPTS, tiny.seeds(PROMPTS, 1)), first) and same(
        other.generate(PROMPTS, tiny.seeds(PROMPTS, 1)), first
    )
    assert torch.equal(torch.get_rng_state(), before), "sampling changed the global random state"
    assert not same(one.generate(PROMPTS, tiny.seeds(PROMPTS, 2)), first)


def test_batches_of_prompts_do_not_repeat_each_others_random_numbers():
    found = engine(batch_size=1).generate([PROMPTS[1]] * 6, tiny.seeds(range(6), 1))
    assert len({tuple(ids.tolist()) for ids in found.ids}) > 3


def test_a_response_does_not_depend_on_the_prompts_that_share_its_batch():
    """Its random numbers are those of its place among the prompts; only rounding depends on its batch."""
    whole = engine(batch_size=100).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    for size in (1, 3):
        found = engine(batch_size=size).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
        assert found.finish_reasons == whole.finish_reasons
        for ids, logps, wanted, wanted_logps in zip(found.ids, found.logps, whole.ids, whole.logps, strict=True):
            assert ids.tolist() == wanted.tolist()
            torch.testing.assert_close(logps, wanted_logps, rtol=0, atol=1e-5)
    first = engine().generate(PROMPTS[:2], tiny.seeds(PROMPTS[:2], 1))
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in whole.ids[:2]]


def test_the_random_numbers_of_a_response_are_those_of_its_seed():
    prompts, numbers = [PROMPTS[1]] * 4, [8, 9, 8, 7]
    found = [ids.tolist() for ids in engine(response_length=12, stop_ids=[]).generate(prompts, numbers).ids]
    assert found[0] == found[2] and len(set(map(tuple, found))) == 3


def test_prompts_of_similar_length_share_a_batch():
    lengths: list[list[int]] = []

    class Watched(TransformersEngine):
        def _generate(self, prompt_ids: Any, *args: Any) -> Any:
            lengths.append([len(each) for each in prompt_ids])
            return super()._generate(prompt_ids, *args)

    settings = {"response_length": 2, "temperature": 1.0, "stop_ids": [], "pad_token_id": 0, "batch_size": 3}
    Watched(tiny.llama(), autocast=contextlib.nullcontext, **settings).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert lengths == [[6, 5, 4], [3, 2, 2], [1, 1]]


def test_results_come_in_the_order_of_the_prompts():
    for size in (1, 3, 100):
        model = tiny.llama()
        found = engine(model, batch_size=size).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
        own = [
            float(dense_logps(model, prompt, ids).gather(-1, ids.unsqueeze(-1)).sum())
            for prompt, ids in zip(PROMPTS, found.ids, strict=True)
        ]
        assert [float(logps.sum()) for logps in found.logps] == pytest.approx(own, abs=1e-4)


def test_a_padding_token_that_the_model_does_not_know_changes_nothing():
    assert same(
        engine(pad_token_id=tiny.VOCAB + 5).generate(PROMPTS, tiny.seeds(PROMPTS, 1)),
        engine().generate(PROMPTS, tiny.seeds(PROMPTS, 1)),
    )


def test_the_model_is_left_as_it_was():
    model = tiny.llama().train()
    model.gradient_checkpointing_enable()
    config = model.generation_config
    engine(model).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert model.generation_config is config and model.training
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
