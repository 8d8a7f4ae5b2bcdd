"""The dataset that an evaluation reads."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError

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
