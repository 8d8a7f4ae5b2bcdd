"""From scores to advantages: where the score is added, whitening, and the anchor's statistics."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.watched import CUT, ENDED, run
from trl_trustkl import load_records

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("position", "expected"), [("after_eos", [3, 5]), ("eos", [2, 5])])
def test_the_score_is_placed_where_configured(tmp_path, position, expected):
    changes = {"max_steps": 1, "score_position": position, "kl_coef": 0.0, "gamma": 1.0, "lam": 0.0}
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=lambda prompts, completions: [5.0] * 8,
                     script=[ENDED, CUT])  # fmt: skip
    # With values of 0 at the start and λ = 0, a return is the reward at the same position.
    batch = trainer.seen["advantages"][0]
    assert [row.nonzero().flatten().tolist() for row in batch.returns[:2]] == [[index] for index in expected]
    assert batch.returns.max() == 5.0


@pytest.mark.parametrize("whiten", [False, True])
def test_whitened_rewards_have_variance_1_and_keep_their_mean(tmp_path, whiten):
    # With λ = γ = 1 and values of 0, rewards are the differences of returns.
    changes = {"max_steps": 1, "whiten_rewards": whiten, "lam": 1.0, "score_position": "eos", "kl_coef": 0.0}
    script = [ENDED, CUT]
    trainer, _ = run(tmp_path, changes=changes, script=script,
                     reward_funcs=lambda prompts, completions: [float(i) for i in range(8)])  # fmt: skip
    batch = trainer.seen["advantages"][0]
    rewards = batch.returns - torch.cat([batch.returns[:, 1:], torch.zeros(8, 1)], dim=1)
    found = rewards[batch.scored.loss_mask]
    plain = torch.zeros_like(rewards)
    for i in range(8):
        plain[i, script[i % 2][1] - 1] = float(i)
    expected = plain[batch.scored.loss_mask]
    if whiten:
        expected = (expected - expected.mean()) / expected.std() + expected.mean()
        assert float(found.std()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_whitened_over_the_tokens_that_count(tmp_path, whiten):
    trainer, _ = run(tmp_path, changes={"max_steps": 1, "whiten_advantages": whiten}, script=[ENDED, CUT])
    batch = trainer.seen["advantages"][0]
    found = batch.advantages[batch.scored.loss_mask]
    plain = (batch.returns - batch.scored.values)[batch.scored.loss_mask]
    expected = (plain - plain.mean()) / plain.std() if whiten else plain
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (batch.advantages[~batch.scored.loss_mask] == 0).all()


def test_a_single_response_has_no_standard_error(tmp_path):
    changes = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "max_steps": 2,
    }
    tiny.trainer(tmp_path, changes=changes | {"response_length": 1, "whiten_rewards": True}).train()
    for record in load_records(tmp_path):
        assert record["anchor"]["kl_stderr"] is None and record["anchor"]["kl_exact"] is not None
        assert record["refused"] is None
