"""Runs with a user-defined rollout engine."""

from __future__ import annotations

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

pytestmark = pytest.mark.filterwarnings("ignore")


class Dictated:
    """Responds to the prompts with 1 to 4 even words and a stop token, and keeps the calls that it receives."""

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


def test_a_run_with_a_custom_engine(tmp_path):
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
    assert fresh == [True] * 3, "the weights of a rollout were not those of the policy"
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
