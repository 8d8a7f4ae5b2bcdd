"""What reward functions log: columns of the completions, and metrics, as with TRL's GRPO."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests import tiny
from trl_trustkl.errors import RewardError
from trl_trustkl.rollout.reward_log import RESERVED, RewardLog, free_name
from trl_trustkl.types import Logged

pytestmark = pytest.mark.filterwarnings("ignore")


def logged(log: RewardLog) -> Logged:
    found = Logged({}, {})
    log.add_to(found)
    return found


class Odd:
    def __str__(self) -> str:
        return "odd"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", None], ["a", None]),
        ((1, True), [1, True]),
        (np.array([1.5, 2.5]), [1.5, 2.5]),
        (torch.tensor([1, 2]), [1, 2]),
        ([np.float32(0.5), torch.tensor(2)], [0.5, 2]),
        ([["x"], {"y": 1}], [["x"], {"y": 1}]),
        ([Odd(), {1, 2}], ["odd", "{1, 2}"]),
        ([[math.nan], b"x"], ["[nan]", "b'x'"]),
    ],
)
def test_a_column_holds_what_json_has_and_text_for_anything_else(values, expected):
    log = RewardLog(2)
    log.log_extra("column", values)
    column = logged(log).columns["column"]
    assert column == expected and [type(each) for each in column] == [type(each) for each in expected]
    json.dumps(column, allow_nan=False)


@pytest.mark.parametrize("values", ["ab", 1, [1], [1, 2, 3], None, {"a": 1, "b": 2}, np.zeros((1, 2))])
def test_a_column_has_one_value_for_each_completion(values):
    with pytest.raises(ValueError, match=r"log_extra\('column'\) got .* list of 2 values"):
        RewardLog(2).log_extra("column", values)


def test_a_taken_name_gets_a_number():
    log = RewardLog(1)
    for name in ("score", "own", "own"):
        log.log_extra(name, [name])
    found = logged(log)
    log.add_to(found)
    assert list(found.columns) == ["score_2", "own", "own_2", "score_2_2", "own_3", "own_2_2"]
    assert free_name("a", {"a", "a_2"}) == "a_3"


def test_the_metrics_of_several_functions_are_pooled_and_nan_is_left_out():
    log = RewardLog(1)
    for value in (1, torch.tensor(2.0), np.float64(3), math.nan):
        log.log_metric("metric", value)
    found = logged(log)
    log.add_to(found)
    assert found.metrics == {"metric": [1.0, 2.0, 3.0] * 2}
    with pytest.raises(TypeError, match="it must be a number"):
        log.log_metric("metric", "1")


# -- in a run ----------------------------------------------------------------------------------------------------------


def first(prompts, completions, trainer_state, log_extra, log_metric, **_):
    log_extra("step", [trainer_state.global_step] * len(completions))
    log_extra("words", [len(each.split()) for each in completions])
    log_metric("answered", 1.0 + trainer_state.global_step)
    log_metric("trust/kl", 7.0)
    return [0.25] * len(completions)


async def second(completions, log_extra, **_):
    log_extra("words", completions)
    return [None, *[1.0] * (len(completions) - 1)]


def test_a_run_keeps_the_columns_and_logs_the_metrics(tmp_path):
    trainer = tiny.trainer(
        tmp_path, train_dataset=tiny.prompts(chat=False), eval_dataset=tiny.prompts(4, chat=False),
        reward_funcs=[first, second], changes={"max_steps": 2, "logging_steps": 2, "per_device_eval_batch_size": 2},
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    for number, row in enumerate(rows):
        assert row["step"] == row["update"] - 1 == number // 8
        assert row["words"] == len(row["completion"].split()) and row["words_2"] == row["completion"]
        assert row["rewards"] == {"first": 0.25, "second": None if number % 8 == 0 else 1.0}
    log = trainer.state.log_history[0]
    assert log["answered"] == 1.5 and log["trust/kl"] != 7.0 and log["trust/kl_2"] == 7.0
    assert log["rewards/first"] == 0.25 and log["rewards/second"] == 1.0
    found = trainer.evaluate()
    assert found["eval_answered"] == 3.0 and found["eval_rewards/first"] == 0.25 and found["eval_rewards/second"] == 1.0
    assert [row["words"] for row in trainer.evaluate_completions()] == [
        len(row["completion"].split()) for row in trainer.evaluate_completions()
    ]
    assert {key for key in rows[0] if key not in ("step", "words", "words_2")} <= set(RESERVED)
    assert {"kl", "length", "eos_rate", "rewards"} < trainer.evaluate_completions()[0].keys()


def test_a_column_of_the_wrong_length_is_an_error_that_names_the_function(tmp_path):
    def misuses(completions, log_extra, **_):
        log_extra("column", completions[:-1])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="`misuses` raised ValueError: log_extra.'column'. got .* 8 values"):
        tiny.trainer(tmp_path, reward_funcs=misuses).train()


def test_an_attempt_that_fails_logs_nothing(tmp_path):
    calls = []

    def fails_first(completions, log_extra, log_metric, **_):
        calls.append(None)
        log_extra("call", [len(calls)] * len(completions))
        log_metric("call", len(calls))
        if len(calls) == 1:
            raise ConnectionError
        return [0.0] * len(completions)

    trainer = tiny.trainer(tmp_path, reward_funcs=fails_first, changes={"max_steps": 1, "reward_retries": 1})
    trainer.parts.scorer.wait = lambda seconds: False
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["call"] for row in rows} == {2} and trainer.state.log_history[0]["call"] == 2
