"""Evaluation: repeatable, and without influence on the training run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from tests import tiny
from tests.processes import single_process
from tests.tiny import EOS
from tests.watched import run, watched, without_seconds
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError
from trl_trustkl.parallel.sharding import Replicated
from trl_trustkl.ppo.evaluation import Evaluator, chosen_dataset, one_dataset, print_samples
from trl_trustkl.types import Logged, Prompts, Rollout, Scored

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["steps", "between"])
def test_evaluation_does_not_change_the_training_run(tmp_path, name):
    plain = run(tmp_path / "plain", eval_dataset=tiny.prompts(6))[1]
    if name == "steps":
        changes = {"eval_strategy": "steps", "eval_steps": 1, "num_sample_generations": 3}
        trainer, records = run(tmp_path / "evaluated", changes=changes, eval_dataset=tiny.prompts(6))
        assert sum("eval_score" in entry for entry in trainer.state.log_history) == 3
    else:
        trainer = watched(tmp_path / "evaluated", eval_dataset=tiny.prompts(6))
        trainer.evaluate()
        trainer.train()
        records = load_records(tmp_path / "evaluated")
    assert without_seconds(plain) == without_seconds(records)


def test_an_evaluation_can_be_repeated(tmp_path):
    trainer = watched(tmp_path, eval_dataset={"few": tiny.prompts(3), "more": tiny.prompts(6)})
    one, other = ({k: v for k, v in trainer.evaluate().items() if "runtime" not in k} for _ in range(2))
    names = {
        f"eval_{part}_{key}"
        for part in ("few", "more")
        for key in ("score", "kl", "length", "eos_rate", "rewards/good_words")
    }
    assert one == other and set(one) == names
    assert one["eval_few_kl"] == 0.0 and 1 <= one["eval_few_length"] <= 6


class Toy:
    """An evaluator of prompts of token ids. The score of a prompt is its first token; an odd first token has no score."""

    def __init__(self, *, index: int = 0, count: int = 1, own: Dataset | None = None) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        processes = single_process()
        processes.index, processes.count, processes.is_main = index, count, index == 0
        self.model = nn.Linear(1, 1).eval()
        own = DATASET if own is None else own
        models = SimpleNamespace(trained=self.model, tokenizer=tiny.tokenizer(), stop_ids=[EOS], evaluation=own)
        self.args = SimpleNamespace(per_device_eval_batch_size=2, vllm_tensor_parallel_size=1)
        self.calls: list[str] = []
        rollouts = SimpleNamespace(
            weights_changed=lambda: self.calls.append("weights changed"), sync=lambda: self.calls.append("sync"),
            engine=SimpleNamespace(generate=lambda *given: self.calls.append(given)),
        )  # fmt: skip
        self.evaluator = Evaluator(self.args, models, processes, self.collate, rollouts, self.score)

    def collate(self, rows: list[dict[str, Any]]) -> Prompts:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return Prompts(ids, torch.ones_like(ids, dtype=torch.bool), rows)

    def score(self, prompts: Prompts, place: int) -> Scored:
        assert self.calls[-2:] == ["weights changed", "sync"], (
            "the engine did not get the weights before the first batch"
        )
        assert self.model.training, "the kernels of a forward pass in training were not used"
        first = prompts.ids[:, 0]
        self.batches.append((place, first.tolist()))
        ids = torch.stack([first, torch.where(first > 8, EOS, 3)], dim=1)
        rollout = Rollout(prompts.ids, prompts.mask, ids, torch.ones_like(ids, dtype=torch.bool), rows=prompts.rows)
        scores = torch.where(first % 2 == 0, first.float(), math.nan)
        completions = [f"[red]{token}" for token in first.tolist()]
        return SimpleNamespace(
            rollout=rollout, scores=scores, completions=completions, ref_kl=first.unsqueeze(-1).expand(-1, 2) / 4,
            rewards={"first": scores}, logged=Logged({"column": completions}, {"place": [float(place)]}),
        )  # fmt: skip


DATASET = Dataset.from_dict({"input_ids": [[token] for token in (6, 7, 8, 9, 10)]})


def test_metrics_are_means_over_the_prompts_and_the_score_over_those_that_have_one():
    toy = Toy()
    metrics = toy.evaluator.metrics(DATASET, "held_out")
    assert metrics.pop("held_out_runtime") > 0
    expected = {"score": 8.0, "kl": 4.0, "length": 2.0, "eos_rate": 0.4, "rewards/first": 8.0, "place": 2.0}
    assert metrics == {f"held_out_{name}": value for name, value in expected.items()}
    assert toy.batches == [(0, [6, 7]), (2, [8, 9]), (4, [10])] and not toy.model.training
    odd = Dataset.from_dict({"input_ids": [[7], [9]]})
    assert math.isnan(Toy(own=odd).evaluator.metrics(odd, "eval")["eval_score"])


def test_processes_share_the_prompts():
    one, other = Toy(index=0, count=2), Toy(index=1, count=2)
    for toy in (one, other):
        toy.evaluator.rows(DATASET)
    assert one.batches == [(0, [6, 8]), (2, [10])] and other.batches == [(0, [7, 9])]


@pytest.mark.parametrize("shared", [1, 2])
def test_a_process_without_prompts_left_takes_part_in_the_batches_of_those_that_share_its_vllm(shared):
    for index, batches in ((0, 2), (1, 1)):
        toy = Toy(index=index, count=2)
        toy.args.vllm_tensor_parallel_size = shared
        toy.evaluator.rows(DATASET)
        assert len(toy.batches) == batches
        assert toy.calls[2:] == [([], [])] * (2 - batches) * (shared - 1)


def test_processes_with_shards_have_equal_shares_of_the_prompts():
    for rows, left in ((5, 1), (4, 0)):
        for index in range(2):
            prompts = DATASET.select(range(rows))
            toy = Toy(index=index, count=2, own=prompts)
            toy.evaluator.sharding = Halves()
            if left:
                with pytest.raises(ConfigError, match=r"has 5 rows.*Leave out 1: eval_dataset.select\(range\(4\)\)"):
                    toy.evaluator.rows(prompts)
                assert not toy.batches
            else:
                toy.evaluator.rows(prompts)
                assert sum(len(ids) for _, ids in toy.batches) == 2


class Halves(Replicated):
    sharded = True


@pytest.mark.parametrize("few", [True, False])
def test_the_main_process_prints_samples(few, capsys):
    toy, silent = Toy(), Toy(index=1, count=2)
    several = {"one": DATASET, "other": DATASET.select([0])}
    for each in (toy, silent):
        each.evaluator.show(several, few=few)
    lines = capsys.readouterr().out.splitlines()
    assert len(toy.batches) == (2 if few else 4) and len(lines) == 2 * (3 if few else 6)
    assert lines[0] == 'score +6.000  prompt "bad"'
    assert lines[1].strip() == 'completion "[red]6"'
    toy.evaluator.show(None, few=few)
    assert capsys.readouterr().out == ""


def test_text_in_printed_samples_is_escaped(capsys):
    print_samples([{"prompt": [{"role": "user", "content": "ü\x1b[2J"}], "completion": 'a "b"\n', "score": -0.5}])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\u001b[2J" in printed and "ü" in printed
    assert printed.endswith('completion "a \\"b\\"\\n"\n') and printed.startswith("score -0.500  prompt [{")


def test_a_dataset_is_given_or_named_or_that_of_the_trainer():
    own, other = {"few": object(), "more": object()}, object()
    assert chosen_dataset(other, own) is other and chosen_dataset(None, own) is own
    assert chosen_dataset("more", own) is one_dataset("more", own) is own["more"]
    with pytest.raises(ConfigError, match="`eval_dataset` got None"):
        chosen_dataset(None, None)
    with pytest.raises(ConfigError, match="'fewer'"):
        chosen_dataset("fewer", own)
    with pytest.raises(ConfigError, match="got several; name one of 'few', 'more'"):
        one_dataset(None, own)


def test_escape_sequences_in_printed_samples_are_written_out(capsys):
    print_samples([{"prompt": "\x9b2J\u202e", "completion": "", "score": 0.0}])
    assert 'prompt "\\x9b2J\\u202e"' in capsys.readouterr().out
