"""Sampling with transformers, and with an engine of the user's own: against the model's own forward pass, one row at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.errors import ModelError, RewardError
from trl_trustkl.rollout.engine import RolloutEngine, Samples
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
    """log π over the vocabulary at each token of a response, [t, V], from the model's whole forward pass over this row."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0]
    return (logits[len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)


def same(one: Samples, other: Samples) -> bool:
    """Bit for bit."""
    pairs = [pair for name in ("ids", "logps") for pair in zip(getattr(one, name), getattr(other, name), strict=True)]
    return one.finish_reasons == other.finish_reasons and all(torch.equal(*pair) for pair in pairs)


# -- the engine on transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_responses_end_at_their_first_stop_token_or_at_the_length(family):
    found = engine(tiny.FAMILIES[family]().eval()).generate(PROMPTS, seed=1)
    assert len(found.ids) == len(found.logps) == len(found.finish_reasons) == len(PROMPTS)
    for ids, logps, reason in zip(*found, strict=True):
        assert ids.shape == logps.shape and ids.dtype == torch.long
        stops = [position for position, token in enumerate(ids.tolist()) if token in STOPS]
        if reason == "stop":
            assert stops == [len(ids) - 1], "a response goes on after a stop token, or ends without one"
        else:
            assert reason == "length" and stops == [] and len(ids) == LENGTH
    assert set(found.finish_reasons) == {"stop", "length"} and len({len(ids) for ids in found.ids}) > 2


def test_a_stop_token_at_the_last_position_counts_as_a_stop():
    always = engine(stop_ids=list(range(tiny.VOCAB)), response_length=1).generate(PROMPTS, seed=1)
    assert always.finish_reasons == ["stop"] * len(PROMPTS) and all(len(ids) == 1 for ids in always.ids)


def test_without_a_stop_token_every_response_has_the_whole_length():
    """The model's own end of sequence, in its generation config, ends nothing."""
    found = engine(stop_ids=[], response_length=30).generate(PROMPTS, seed=1)
    assert found.finish_reasons == ["length"] * len(PROMPTS) and {len(ids) for ids in found.ids} == {30}
    assert any(2 in ids for ids in found.ids), "no end of sequence was sampled"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_log_probabilities_are_the_models_own_at_the_temperature(family):
    model = tiny.FAMILIES[family]().eval()
    found = engine(model).generate(PROMPTS, seed=1)
    for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
        wanted = dense_logps(model, prompt, ids).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)


def test_log_probabilities_of_filtered_sampling_are_those_of_the_filtered_distribution():
    model = tiny.llama()
    found = engine(model, generation_kwargs={"top_k": 3}).generate(PROMPTS, seed=1)
    for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
        dense = dense_logps(model, prompt, ids)
        top = dense.topk(3, dim=-1)
        assert (top.indices == ids.unsqueeze(-1)).any(-1).all()
        wanted = dense.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - top.values.logsumexp(-1)
        torch.testing.assert_close(logps.double(), wanted, rtol=0, atol=1e-5)


def test_samples_follow_from_the_seed_alone():
    one, other = engine(), engine()
    first = one.generate(PROMPTS, seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert same(one.generate(PROMPTS, seed=1), first) and same(other.generate(PROMPTS, seed=1), first)
    assert torch.equal(torch.get_rng_state(), before), "sampling drew from the program's random numbers"
    assert not same(one.generate(PROMPTS, seed=2), first)


def test_batches_of_prompts_do_not_repeat_each_others_random_numbers():
    found = engine(batch_size=1).generate([PROMPTS[1]] * 6, seed=1)
    assert len({tuple(ids.tolist()) for ids in found.ids}) > 3


def test_results_come_in_the_order_of_the_prompts():
    for size in (1, 3, 100):
        model = tiny.llama()
        found = engine(model, batch_size=size).generate(PROMPTS, seed=1)
        own = [
            float(dense_logps(model, prompt, ids).gather(-1, ids.unsqueeze(-1)).sum())
            for prompt, ids in zip(PROMPTS, found.ids, strict=True)
        ]
        assert [float(logps.sum()) for logps in found.logps] == pytest.approx(own, abs=1e-4)


def test_a_padding_token_that_the_model_does_not_know_changes_nothing():
    assert same(engine(pad_token_id=tiny.VOCAB + 5).generate(PROMPTS, seed=1), engine().generate(PROMPTS, seed=1))


def test_the_model_is_left_as_it_was():
    model = tiny.llama().train()
    model.gradient_checkpointing_enable()
    config = model.generation_config
    engine(model).generate(PROMPTS, seed=1)
    assert model.generation_config is config and model.training
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -- an engine of the user's own ---------------------------------------------------------------------------------------


class Dictated:
    """Answers the n-th prompt of a rollout with n + 1 even words and a stop token; keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.weights: dict[str, Tensor] = {}

    def check(self) -> None:
        self.calls.append("check")

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.calls.append(("sync", version))
        self.weights = {name: weight.detach().clone() for name, weight in weights}

    def generate(self, prompt_ids: Sequence[Tensor], seed: int) -> Samples:
        self.calls.append(("generate", [ids.tolist() for ids in prompt_ids], seed))
        ids = [torch.tensor([*[9, 11, 13, 15][: 1 + i % 4], 2]) for i in range(len(prompt_ids))]
        return Samples(ids, None, ["stop"] * len(ids))

    def close(self) -> None:
        self.calls.append("close")


def test_a_run_with_an_engine_of_the_users_own(tmp_path):
    mine: RolloutEngine = Dictated()
    fresh: list[bool] = []
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 3, "stop_token": "eos"})
    generate = mine.generate

    def generate_fresh(prompt_ids: Sequence[Tensor], seed: int) -> Samples:
        policy = dict(trainer.model.policy.named_parameters())
        fresh.append(
            policy.keys() == mine.weights.keys() and all(map(torch.equal, policy.values(), mine.weights.values()))
        )
        return generate(prompt_ids, seed)

    mine.generate = generate_fresh
    trainer.parts.engine = mine
    before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.policy.named_parameters())
    assert fresh == [True] * 3, "a rollout was sampled from other weights than the policy's"
    assert [call if isinstance(call, str) else call[0] for call in mine.calls] == [
        "check", *["sync", "generate"] * 3, "close"
    ]  # fmt: skip
    assert [call[1] for call in mine.calls if call[0] == "sync"] == [0, 1, 2]
    asked = [call for call in mine.calls if call[0] == "generate"]
    assert len({seed for _, _, seed in asked}) == 3
    for _, prompts, _ in asked:
        assert len(prompts) == 8 and all(prompts) and not any(0 in ids for ids in prompts), "padding reached the engine"
    for record in load_records(tmp_path):
        assert record["length"] == 3.5 and record["eos_rate"] == 1.0 and record["sampler"]["kl"] is None
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in rows} == {" ".join(["w2", "w4", "w6", "w8"][: 1 + i]) for i in range(4)}


def test_an_engine_is_closed_where_a_run_fails(tmp_path):
    mine = Dictated()
    trainer = tiny.trainer(tmp_path, reward_funcs=lambda **_: ["no number"] * 8)
    trainer.parts.engine = mine
    with pytest.raises(RewardError):
        trainer.train()
    assert mine.calls[0] == "check" and mine.calls[-1] == "close"


@pytest.mark.parametrize(
    ("ids", "said"), [([[9, 2]] * 7, "returned 7 responses"), ([[9] * 7] * 8, "responses of up to 7 tokens")]
)
def test_an_engine_that_returns_something_else_is_named(tmp_path, ids, said):
    mine = Dictated()
    mine.generate = lambda prompts, seed: Samples([torch.tensor(row) for row in ids], None, ["stop"] * len(ids))
    trainer = tiny.trainer(tmp_path)
    trainer.parts.engine = mine
    with pytest.raises(ModelError, match=f"rollout engine Dictated {said}|rollout engine Dictated returned 8 {said}"):
        trainer.train()
