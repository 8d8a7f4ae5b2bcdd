"""Responses without a reward: they have no gradient, and the others keep theirs."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.scripted import EOS, WORDS, scripted
from tests.weights import WatchWeights, same, trained_weights
from trl_trustkl import load_records

pytestmark = pytest.mark.filterwarnings("ignore")


def none_for_even_rows(prompts, completions, **_):
    return [None if i % 2 == 0 else float(i) for i in range(len(completions))]


@pytest.mark.parametrize("position", ["after_eos", "eos"])
def test_a_row_without_a_reward_gets_no_gradient_and_leaves_the_others_theirs(tmp_path, position):
    script = [([5, 7, EOS], 3), WORDS]
    changes = {"score_position": position, "vf_coef": 1.0}
    trainer = scripted(tmp_path, script, reward_funcs=none_for_even_rows, changes=changes)
    captured = {}
    advantages = trainer.advantages
    trainer.advantages = lambda scored: captured.setdefault("batch", advantages(scored))
    trainer.train()
    batch, scored = captured["batch"], trainer.scored
    without = torch.tensor([True, False] * 4)
    assert scored.scores.isnan().tolist() == without.tolist()
    assert not scored.loss_mask[without].any() and not scored.value_mask[without].any()
    assert scored.loss_mask[~without].sum(1).tolist() == [4] * 4
    assert (batch.advantages[without] == 0).all() and (
        batch.advantages[~without][scored.loss_mask[~without]] != 0
    ).any()
    assert not batch.advantages.isnan().any() and not batch.returns.isnan().any()
    assert load_records(tmp_path)[0]["score"] == 4.0  # the mean of 1, 3, 5 and 7


def test_the_gradient_does_not_depend_on_a_row_without_a_reward(tmp_path):
    """Other tokens in the rows without a reward lead to the same weights."""
    outcomes = []
    for name, tokens in (("one", [5, 7, 9, 11]), ("other", [30, 31, 32, 33])):
        changes = {"num_mini_batches": 1, "num_ppo_epochs": 1, "learning_rate": 0.01}
        trainer = scripted(tmp_path / name, [(tokens, 4), WORDS], reward_funcs=none_for_even_rows, changes=changes)
        before = trained_weights(trainer.model)
        trainer.train()
        after = trained_weights(trainer.model)
        assert not same(before, after)
        outcomes.append(after)
    for name, weight in outcomes[0].items():
        torch.testing.assert_close(weight, outcomes[1][name], rtol=0, atol=1e-6)


def test_an_update_without_any_reward_changes_nothing_and_the_run_continues(tmp_path):
    def none_at_first(prompts, completions, trainer_state, **_):
        return [None if trainer_state.global_step == 0 else float(i) for i in range(len(completions))]

    changes = {"learning_rate": 0.01}
    trainer = tiny.trainer(tmp_path, reward_funcs=none_at_first, changes=changes, callbacks=[watch := WatchWeights()])
    trainer.train()
    first, second, _ = load_records(tmp_path)
    assert first["score"] is None and first["refused"] is None and first["gradient"]["norm"] == 0
    assert same(watch.snapshots[0], watch.snapshots[1])
    assert second["score"] == 3.5 and not same(watch.snapshots[1], watch.snapshots[2])


def test_a_row_with_one_reward_of_two_keeps_that_one(tmp_path):
    functions = [none_for_even_rows, lambda prompts, completions: [1.0] * 7 + [None]]
    trainer = scripted(tmp_path, [WORDS], reward_funcs=functions, changes={"reward_weights": [2.0, 1.0]})
    trainer.train()
    assert trainer.scored.scores.tolist() == [1.0, 3.0, 1.0, 7.0, 1.0, 11.0, 1.0, 14.0]
