"""The dataset that an evaluation reads."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_no_evaluation_set_is_an_error_of_evaluate(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path).evaluate()
    assert_says(error, "`eval_dataset`", "None", "give one")


def test_one_of_several_evaluation_sets_is_chosen_by_its_name(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_dataset={"few": tiny.prompts(2), "more": tiny.prompts(5)})
    few = trainer.evaluate("few")
    assert few["eval_score"] == trainer.evaluate()["eval_few_score"]
    assert len(trainer.evaluate_completions("more")) == 5
    with pytest.raises(ConfigError) as error:
        trainer.evaluate("fewer")
    assert_says(error, "`eval_dataset`", "'fewer'", "'few', 'more'")
    with pytest.raises(ConfigError) as error:
        trainer.evaluate_completions()
    assert_says(error, "`eval_dataset`", "'few', 'more'")


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 5, "max_steps": 2}


@pytest.mark.parametrize(
    ("sets", "metric", "message"),
    [
        (("few", "more"), "score", "`metric_for_best_model` got 'score'"),
        (("few", "more"), "eval_kl", "such as 'few_score'. The evaluation sets are 'few', 'more'"),
        ((), None, "`eval_dataset` got an empty dict"),
    ],
)
def test_several_evaluation_sets_need_the_metric_of_one(tmp_path, sets, metric, message):
    sets = {name: tiny.prompts(2) for name in sets}
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, eval_dataset=sets, changes=EVALUATED | {"metric_for_best_model": metric})
    assert message in str(error.value)


@pytest.mark.parametrize("metric", ["more_score", "eval_few_kl"])
def test_the_metric_of_one_of_several_sets_chooses_the_best(tmp_path, metric):
    trainer = tiny.trainer(
        tmp_path,
        eval_dataset={"few": tiny.prompts(2), "more": tiny.prompts(3)},
        changes=EVALUATED | {"metric_for_best_model": metric, "save_strategy": "best"},
    )
    trainer.train()
    assert trainer.state.best_metric is not None and list(tmp_path.glob("checkpoint-*"))


def test_a_metric_that_no_evaluation_gives_is_an_error_after_the_last_update_is_saved(tmp_path):
    changes = EVALUATED | {"metric_for_best_model": "scoer", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.prompts(2), changes=changes | {"save_steps": 1})
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert_says(error, "`metric_for_best_model`", "'scoer'", "'score', 'kl'", "The last update is saved")
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_dataset_is_read_in_the_same_way_by_the_trainer_and_by_evaluate(tmp_path):
    """The token ids are made from its prompts, whatever ids it has."""
    rows = tiny.prompts(4)
    given = rows.add_column("input_ids", [[3]] * 4)
    trainer = tiny.trainer(tmp_path, eval_dataset=given)
    own = trainer.evaluate_completions()
    assert trainer.evaluate_completions(given) == own == tiny.trainer(tmp_path).evaluate_completions(rows)


def test_a_dataset_of_token_ids_is_checked_by_evaluate(tmp_path):
    trainer = tiny.trainer(tmp_path)
    for ids, said in (([999], "the token id 999"), ([], "no token"), ([3] * 200, "more than the context")):
        with pytest.raises(DataError, match=f"`eval_dataset` row 0 has .*{said}"):
            trainer.evaluate(Dataset.from_dict({"input_ids": [ids]}))


def test_rows_of_a_stream_may_have_different_columns(tmp_path):
    seen: list[Any] = []

    def judge(completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
        seen.extend(answer)
        return [0.0] * len(completions)

    prompts = [row["prompt"] for row in tiny.prompts(4)]
    rows = [{"prompt": prompt} | ({"answer": place} if place % 2 else {}) for place, prompt in enumerate(prompts)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = tiny.trainer(
        tmp_path, reward_funcs=judge, train_dataset=stream, eval_dataset=stream, changes={"max_steps": 1}
    )
    trainer.evaluate()
    assert sorted(seen, key=str) == [1, 3, None, None]
    trainer.train()
    assert {1, 3, None} == set(seen[4:])
