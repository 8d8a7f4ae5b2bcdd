"""Advantages without a value: of the scores less the anchor's cost, over the groups of a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.watched import CUT, ENDED, Watched, run
from trl_trustkl.advantages import group_advantages

pytestmark = pytest.mark.filterwarnings("ignore")

SCORES = [1.0, None, 0.25, 3.0, 0.5, 0.5, 0.5, None]
"""Of two groups of four; the rewards of the second are equal."""
ANCHORED = {"kl_coef": 0.3, "learning_rate": 3e-2, "max_steps": 3, "num_mini_batches": 1}


def trained(folder: Any, rewards: Any = None, **changes: Any) -> tuple[Watched, list[dict[str, Any]]]:
    """A run with two groups of four in a batch; by default the scores are of all responses, and the last update is anchored."""
    changes = {"advantage_estimator": "grpo", "num_generations": 4, **ANCHORED} | changes
    rewards = rewards or (lambda prompts, completions, **_: SCORES)
    return run(folder, changes=changes, reward_funcs=rewards, script=[ENDED, CUT])


def expected(trainer: Watched, coef: float, **options: Any) -> tuple[Tensor, Tensor]:
    """The advantages of the last update's responses, and the anchor's part of their rewards."""
    scored = trainer.seen["score"][-1]
    cost = torch.where(scored.loss_mask, scored.logp - scored.ref_logp, 0.0).sum(1)
    given = torch.tensor([math.nan if score is None else score for score in SCORES])
    found = group_advantages(given - coef * cost, ~given.isnan(), size=4, **options)
    return found.advantages, -coef * cost


@pytest.mark.parametrize("scale", ["group", "batch", "none", None])
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_the_anchor_is_subtracted_from_the_score_before_the_baseline(tmp_path, scale, placement):
    changes = {"scale_rewards": scale} if scale else {"advantage_estimator": "rloo"}
    trainer, records = trained(
        tmp_path, kl_placement=placement, kl_estimator="k1" if placement == "reward" else "k3", **changes
    )
    batch = trainer.seen["advantages"][-1]
    estimator = changes.get("advantage_estimator", "grpo")
    coef = 0.3 if placement == "reward" else 0.0
    wanted, pull = expected(trainer, coef, estimator=estimator, scale=scale or "none")
    mask = batch.scored.loss_mask
    torch.testing.assert_close(batch.advantages, torch.where(mask, wanted[:, None], 0.0), rtol=1e-5, atol=1e-5)
    assert not mask[1].any() and not mask[7].any() and not batch.returns.any()
    assert records[-1]["advantage"] == {
        "estimator": estimator, "num_generations": 4, "groups": 2, "groups_without_signal": int(placement == "loss"),
    }  # fmt: skip
    assert (records[-1]["anchor"]["share"] is None) == (placement == "loss") and bool(pull.any()) == (coef > 0)


def test_the_share_of_the_anchor_is_that_of_the_advantages_tokens(tmp_path):
    trainer, records = trained(tmp_path, scale_rewards="none")
    wanted, pull = expected(trainer, 0.3, estimator="grpo", scale="none")
    mask = trainer.seen["score"][-1].loss_mask
    known = mask.any(1).view(2, 4)
    mean = torch.where(known, pull.view(2, 4), 0.0).sum(1, keepdim=True) / known.sum(1, keepdim=True)
    part = torch.where(known, pull.view(2, 4) - mean, 0.0).flatten()
    weights = mask.sum(1)
    share = float((weights * part.abs()).sum() / (weights * (part.abs() + (wanted - part).abs())).sum())
    assert records[-1]["anchor"]["share"] == pytest.approx(share, rel=1e-5) and 0 < share < 1
    assert records[0]["anchor"]["share"] == 0.0, "the first update is made at the reference"


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_whitened_advantages_are_those_of_the_responses_that_are_compared(tmp_path, estimator):
    changes = {"advantage_estimator": estimator, "kl_coef": 0.3, "kl_placement": "both", "kl_estimator": "k3"}
    plain, _ = trained(tmp_path / "plain", **changes)
    whitened, _ = trained(tmp_path / "whitened", **changes, whiten_advantages=True)
    before, after = (trainer.seen["advantages"][0] for trainer in (plain, whitened))
    known = torch.tensor([score is not None for score in SCORES])
    std = before.advantages[:, 0][known].std()  # their mean is 0
    torch.testing.assert_close(after.advantages, before.advantages / (std + 1e-4), rtol=1e-5, atol=1e-5)
    assert not after.advantages[4:].any(), "a group without a signal got one"
    assert before.advantage_scale == 1.0 and after.advantage_scale == pytest.approx(1 / float(std + 1e-4))


def test_without_any_signal_nothing_is_learnt(tmp_path):
    trainer, records = trained(tmp_path, lambda prompts, completions: [1.0] * 8, kl_coef=0.0, whiten_advantages=True)
    for record in records:
        assert record["advantage"]["groups_without_signal"] == 2 and record["refused"] is None
        assert record["trust"]["kl"] == 0.0 and record["gradient"]["norm"] == 0.0
    assert trainer.seen["advantages"][0].advantage_scale == 1.0


def test_with_a_value_several_responses_to_a_prompt_are_whitened_as_ever(tmp_path):
    trainer, records = trained(tmp_path, advantage_estimator="gae")
    batch = trainer.seen["advantages"][0]
    found = batch.advantages[batch.scored.loss_mask]
    assert float(found.mean()) == pytest.approx(0, abs=1e-5) and float(found.std()) == pytest.approx(1, abs=1e-3)
    assert batch.groups is None and records[0]["advantage"] is None and records[0]["value"]["clip"] == 0.2


def test_whitening_is_on_for_gae_alone_unless_it_is_set(tmp_path):
    grouped = {"advantage_estimator": "rloo", "num_generations": 2}
    for changes, default in (({}, True), (grouped, False)):
        assert tiny.config(tmp_path, **changes).whitens_advantages is default
        for given in (True, False):
            assert tiny.config(tmp_path, **changes, whiten_advantages=given).whitens_advantages is given


@pytest.mark.parametrize(("given", "name"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_the_scale_may_be_given_as_in_trl(tmp_path, given, name):
    args = tiny.config(tmp_path, advantage_estimator="grpo", num_generations=2, scale_rewards=given)
    assert args.scale_rewards == name
