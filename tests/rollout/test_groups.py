"""The order of prompts that have several responses each."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.watched import run
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.rollout.groups import GroupedOrder
from trl_trustkl.rollout.prompt_stream import StreamOrder
from trl_trustkl.rollout.prompts import PromptOrder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "inner", [PromptOrder(10, 3, seed=5), StreamOrder(batch_size=3, updates=7)], ids=["rows", "stream"]
)
def test_every_prompt_comes_several_times_in_a_row(inner):
    order = GroupedOrder(inner, 4)
    assert order.batches_per_pass == inner.batches_per_pass
    for update in (0, 3, 4):
        assert order.rows(update) == [row for row in inner.rows(update) for _ in range(4)]
        assert GroupedOrder(inner, 1).rows(update) == inner.rows(update)


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_a_batch_counts_responses_and_a_pass_takes_every_prompt_once(tmp_path, estimator, streamed):
    numbers = list(range(16))
    data = tiny.prompts(16).add_column("number", numbers)
    seen: list[list[int]] = []

    def reward(prompts, completions, number, **_):
        seen.append(list(number))
        return [float(n) + i for i, n in enumerate(number)]

    changes = {"advantage_estimator": estimator, "num_generations": 2, "local_rollout_forward_batch_size": 3}
    changes |= {"max_steps": 8} if streamed else {"max_steps": -1, "num_train_epochs": 2.0}
    trainer, records = run(tmp_path, changes=changes, reward_funcs=reward,
                           train_dataset=data.to_iterable_dataset() if streamed else data)  # fmt: skip
    assert [record["episode"] for record in records] == [8 * update for update in range(1, 9)]
    assert trainer.args.total_episodes == 64
    for rows in seen:
        assert rows[::2] == rows[1::2] and len(set(rows)) == 4
    for first in (0, 4):
        assert sorted(row for rows in seen[first : first + 4] for row in rows[::2]) == numbers
    assert seen[:4] != seen[4:]
    if not streamed:
        assert trainer.state.epoch == 2.0
    for rollout in trainer.seen["rollout"]:
        assert not (rollout.response_ids[::2] == rollout.response_ids[1::2]).all(), (
            "the responses to a prompt are equal"
        )


def test_evaluation_samples_one_response_to_each_prompt(tmp_path):
    changes = {"advantage_estimator": "grpo", "num_generations": 4, "max_steps": 1}
    trainer, _ = run(tmp_path, changes=changes, eval_dataset=tiny.prompts(6))
    assert len(trainer.evaluate_completions()) == 6


def test_a_dataset_without_enough_prompts_for_a_batch_is_an_error(tmp_path):
    changes = {"advantage_estimator": "grpo", "num_generations": 2}
    tiny.trainer(tmp_path, changes=changes, train_dataset=tiny.prompts(4))
    with pytest.raises(DataError, match="3 rows, fewer than one batch of 4 .* / num_generations"):
        tiny.trainer(tmp_path, changes=changes, train_dataset=tiny.prompts(3))


def test_groups_that_do_not_fill_a_batch_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="`num_generations` got 3; it must divide .* 4 × 2 × 1 = 8 responses"):
        tiny.trainer(tmp_path, changes={"advantage_estimator": "rloo", "num_generations": 3})


def test_a_run_continues_with_the_next_prompts_after_a_resume(tmp_path):
    changes = {"advantage_estimator": "rloo", "num_generations": 4, "save_strategy": "steps", "save_steps": 1}
    changes |= {"lr_scheduler_type": "constant"}
    run(tmp_path / "one", changes=changes | {"max_steps": 4})
    run(tmp_path / "two", changes=changes | {"max_steps": 2})
    trainer = tiny.trainer(tmp_path / "two", changes=changes | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1] and len(load_records(tmp_path / "two")) == 4
