"""Runs with a user-defined rollout engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, RewardError, RolloutError
from trl_trustkl.rollout.engine import RolloutEngine, Samples

pytestmark = pytest.mark.filterwarnings("ignore")

OFF = {"vllm_importance_sampling_correction": False}
"""For an engine that returns no log-probabilities."""


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

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        self.calls.append(("generate", [ids.tolist() for ids in prompt_ids], tuple(seeds)))
        ids = [torch.tensor([*[9, 11, 13, 15][: 1 + i % 4], 2]) for i in range(len(prompt_ids))]
        return Samples(ids, None, ["stop"] * len(ids))

    def close(self) -> None:
        self.calls.append("close")


def test_a_run_with_a_custom_engine(tmp_path):
    mine: RolloutEngine = Dictated()
    fresh: list[bool] = []
    trainer = tiny.trainer(
        tmp_path, changes={"max_steps": 3, "stop_token": "eos", **OFF}, rollout_engine=mine, peft_config=None
    )
    generate = mine.generate

    def generate_fresh(prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        policy = dict(trainer.model.policy.named_parameters(remove_duplicate=False))
        fresh.append(
            policy.keys() == mine.weights.keys() and all(torch.equal(policy[n], w) for n, w in mine.weights.items())
        )
        return generate(prompt_ids, seeds)

    mine.generate = generate_fresh
    before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.policy.named_parameters())
    assert fresh == [True] * 3, "the weights of a rollout were not those of the policy"
    assert [call if isinstance(call, str) else call[0] for call in mine.calls] == [
        "check", *["sync", "generate"] * 3, "close"
    ]  # fmt: skip
    versions = [call[1] for call in mine.calls if call[0] == "sync"]
    assert versions == sorted(set(versions)), "an update made no new version of the weights"
    asked = [call for call in mine.calls if call[0] == "generate"]
    assert len({seed for _, _, seeds in asked for seed in seeds}) == 3 * 8
    for _, prompts, _ in asked:
        assert len(prompts) == 8 and all(prompts) and not any(0 in ids for ids in prompts), "padding reached the engine"
    for record in load_records(tmp_path):
        assert record["length"] == 3.5 and record["eos_rate"] == 1.0 and record["sampler"]["kl"] is None
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in rows} == {" ".join(["w2", "w4", "w6", "w8"][: 1 + i]) for i in range(4)}


def test_an_engine_is_closed_where_a_run_fails(tmp_path):
    mine = Dictated()
    trainer = tiny.trainer(tmp_path, reward_funcs=lambda **_: ["no number"] * 8, changes=OFF, rollout_engine=mine)
    with pytest.raises(RewardError):
        trainer.train()
    assert mine.calls[0] == "check" and mine.calls[-1] == "close"


class Failing(Dictated):
    """Fails in the third rollout."""

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        if len([call for call in self.calls if call[0] == "generate"]) == 2:
            self.calls.append("failed")
            raise ConnectionError("the machine is gone")
        return super().generate(prompt_ids, seeds)


def test_the_last_complete_update_is_saved_where_an_engine_fails_and_the_run_resumes(tmp_path):
    changes = {"max_steps": 4, "stop_token": "eos", "save_strategy": "no", **OFF}
    whole = tiny.trainer(tmp_path / "whole", changes=changes, rollout_engine=Dictated())
    whole.train()
    mine = Failing()
    trainer = tiny.trainer(tmp_path / "failed", changes=changes, rollout_engine=mine)
    with pytest.raises(RolloutError, match="rollout engine Failing failed: ConnectionError: the machine is gone"):
        trainer.train()
    assert mine.calls[-1] == "close" and len(load_records(tmp_path / "failed")) == 2
    resumed = tiny.trainer(tmp_path / "failed", changes=changes, rollout_engine=Dictated())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"trust_max_kl": 1e-9}, "backtrack"), ({"panic_kl": 1e-12, "max_refused": 9}, "rolled back"), ({}, "whole")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_update_makes_a_new_version_and_its_weights_go_out_after_enforcement(tmp_path, changes, kept):
    mine = Dictated()
    sent: list[dict[str, Tensor]] = []
    sync = mine.sync

    def keeping(version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        sync(version, weights)
        sent.append(mine.weights)

    mine.sync = keeping
    trainer = tiny.trainer(
        tmp_path, changes={"max_steps": 3, "stop_token": "eos", **OFF, **changes}, rollout_engine=mine
    )
    trainer.train()
    versions = [call[1] for call in mine.calls if call[0] == "sync"]
    assert len(set(versions)) == 3
    moved = [max(float((b[n] - a[n]).abs().max()) for n in a) for a, b in pairwise(sent)]
    assert all(each == 0 for each in moved) if kept == "rolled back" else all(each > 0 for each in moved)
    if kept == "backtrack":
        assert max(moved) < 1e-3 and all(record["trust"]["scale"] < 1 for record in load_records(tmp_path))


def test_an_evaluation_outside_of_a_run_gets_the_weights_that_the_policy_has_then(tmp_path):
    mine = Dictated()
    trainer = tiny.trainer(tmp_path, changes=OFF, rollout_engine=mine, eval_dataset=tiny.prompts(6))
    for value in (0.5, 0.25):
        with torch.no_grad():
            next(trainer.model.policy.parameters()).fill_(value)
        trainer.evaluate()
        assert float(next(iter(mine.weights.values())).mean()) == value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"generation_kwargs": {"top_k": 5}}, "generation_kwargs"),
        ({"local_rollout_forward_batch_size": 7}, "local_rollout_forward_batch_size"),
        ({"use_vllm": True}, "use_vllm"),
    ],
)
def test_a_field_that_a_custom_engine_ignores_is_an_error(tmp_path, changes, field):
    with pytest.raises(ConfigError, match=f"`{field}` got .* together with the trainer's `rollout_engine`"):
        tiny.trainer(tmp_path, changes=changes, rollout_engine=Dictated())
