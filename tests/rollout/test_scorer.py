"""The scores of a rollout: those of each function, and their weighted sum."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from trl_trustkl.errors import NonFiniteRewardError, RewardError
from trl_trustkl.rollout.rewards import RewardModel
from trl_trustkl.rollout.scorer import Scorer, Scores
from trl_trustkl.types import Rollout

STATE = SimpleNamespace(global_step=7)
COMPLETIONS = ["a", "b c", "d"]


def rollout(rows: list[dict[str, Any]] | None = None) -> Rollout:
    ids, mask = torch.arange(3, 9).view(3, 2), torch.ones(3, 2, dtype=torch.bool)
    return Rollout(ids, mask, ids + 6, mask, rows=rows)


def scores(
    funcs: list[Any], weights: list[float] | None = None, *, given: Rollout | None = None, **options: Any
) -> Scores:
    scorer = Scorer(funcs, [1.0] * len(funcs) if weights is None else weights, batch_size=2, **options)
    return scorer(
        rollout() if given is None else given,
        prompts=["p", "q", "r"],
        completions=COMPLETIONS,
        completion_ids=[[1], [2, 3], [4]],
        state=STATE,
    )


def says(*values: float | None, name: str = "says") -> Any:
    def function(completions: list[str], **_: Any) -> list[float | None]:
        return list(values)

    function.__name__ = name
    return function


def assert_equal(total: torch.Tensor, *wanted: float) -> None:
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


def test_each_function_is_listed_by_its_name_in_their_order():
    found = scores([says(1, 2, 3, name="first"), says(0.5, None, -1, name="second")])
    assert list(found.by_function.items()) == [("first", [1.0, 2.0, 3.0]), ("second", [0.5, None, -1.0])]


def test_functions_of_the_same_name_are_numbered():
    found = scores([says(1, 1, 1), says(2, 2, 2), says(3, 3, 3), says(4, 4, 4, name="says_2")])
    assert [(name, values[0]) for name, values in found.by_function.items()] == [
        ("says", 1.0), ("says_2", 2.0), ("says_3", 3.0), ("says_2_2", 4.0)
    ]  # fmt: skip
    assert_equal(found.total, 10, 10, 10)


def test_an_object_without_a_name_has_its_types():
    class Judge:
        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [float(len(text)) for text in completions]

    assert scores([Judge(), Judge()]).by_function == {"Judge": [1.0, 3.0, 1.0], "Judge_2": [1.0, 3.0, 1.0]}


def test_the_total_is_the_weighted_sum():
    found = scores([says(1, 2, 3), says(10, 20, 30)], [0.5, -2.0])
    assert_equal(found.total, -19.5, -39, -58.5)
    assert found.by_function["says"] == [1.0, 2.0, 3.0], "the scores of a function were multiplied by its weight"


def test_the_total_is_added_in_float64():
    assert_equal(scores([says(2.0**40, 0, 0), says(1, 1, 1), says(-(2.0**40), 0, 0)]).total, 1, 1, 1)


def test_none_adds_nothing_and_none_from_all_functions_is_no_score():
    found = scores([says(1, None, None), says(None, 5, None)], [2.0, 3.0])
    assert_equal(found.total, 2, 15, math.nan)
    assert found.by_function == {"says": [1.0, None, None], "says_2": [None, 5.0, None]}


def test_a_weight_of_zero_leaves_a_row_scored():
    assert_equal(scores([says(7, None, 0)], [0.0]).total, 0, math.nan, 0)


def test_functions_get_the_columns_and_the_keywords_that_they_name():
    rows = [{"prompt": "x", "wanted": str(i), "trainer_state": "a column", "prompts": "a column"} for i in range(3)]
    seen: dict[str, Any] = {}

    def function(prompts, completions, wanted, completion_ids, trainer_state):
        seen.update(locals())
        return [0.0] * 3

    def everything(**given: Any) -> list[float]:
        seen["all"] = set(given)
        return [0.0] * 3

    scores([function, everything], given=rollout(rows))
    assert seen["wanted"] == ["0", "1", "2"] and seen["completion_ids"] == [[1], [2, 3], [4]]
    assert seen["trainer_state"] == STATE and seen["prompts"] == ["p", "q", "r"]
    assert seen["completions"] == COMPLETIONS
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert seen["all"] == {*given, "wanted"}


def test_a_reward_model_is_read_in_batches_with_the_same_scores():
    model = RewardModel(tiny.scalar_model(tiny.llama()), None)
    ids = torch.cat([rollout().prompt_ids, rollout().response_ids], dim=1)
    with torch.no_grad():
        wanted = model.model(input_ids=ids).logits[:, 0]
    found = scores([model, says(1, 1, 1)], [2.0, 1.0])
    assert list(found.by_function) == ["LlamaForSequenceClassification", "says"]
    torch.testing.assert_close(found.total, 2 * wanted + 1)


@pytest.mark.parametrize("count", [2, 4])
def test_the_wrong_number_of_rewards_is_an_error(count):
    with pytest.raises(RewardError, match=f"`says` returned {count} rewards for 3 completions"):
        scores([says(*range(count))])


def test_a_sum_beyond_float32_is_an_error_although_each_reward_is_within():
    with pytest.raises(NonFiniteRewardError, match="reward_weights=\\[1.0, 1.0\\].*4e\\+38"):
        scores([says(2e38, 0, 0), says(2e38, 0, 0)])


class Fails:
    """A reward function that raises `times` times, then returns rewards."""

    def __init__(self, times: int) -> None:
        self.left, self.calls = times, 0

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise ConnectionError("no answer")
        return [1.0] * 3


def test_a_function_that_fails_is_retried_after_increasing_delays():
    waited, function, other = [], Fails(8), Fails(0)
    found = scores([other, function], retries=8, wait=lambda seconds: waited.append(seconds))
    assert_equal(found.total, 2, 2, 2)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60] and function.calls == 9
    assert other.calls == 1, "a function that had returned was called again"


def test_the_last_failure_is_raised():
    waited, function = [], Fails(9)
    with pytest.raises(RewardError, match="`Fails` raised ConnectionError: no answer"):
        scores([function], retries=2, wait=lambda seconds: waited.append(seconds))
    assert waited == [1, 2] and function.calls == 3


def test_waiting_that_is_interrupted_gives_up():
    function = Fails(9)
    with pytest.raises(RewardError, match="no answer"):
        scores([function], retries=5, wait=lambda seconds: True)
    assert function.calls == 1
