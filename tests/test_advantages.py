"""Rewards of the anchor, generalised advantage estimation, and what is derived from them."""

from __future__ import annotations

import itertools
import math
import statistics
import typing

import pytest
import torch
from torch import Tensor

from tests.enumeration import (
    COEF,
    T,
    Tree,
    V,
    assert_same,
    configuration,
    contexts_of,
    fixed_and_own_length,
    kl,
    tables,
    update,
)
from trl_trustkl.advantages import (
    BASELINES,
    AdvantageEstimator,
    anchor_part,
    anchor_rewards,
    anchor_share,
    explained_variance,
    gae,
    group_advantages,
    group_part,
    place_scores,
    score_index,
    value_positions,
)
from trl_trustkl.types import Scored

torch.set_num_threads(1)


@pytest.mark.parametrize("of_contexts", [False, True])
def test_positions_after_the_end_of_a_response_cost_nothing(of_contexts):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    divergence = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, 4.0]])
    expected = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]] if of_contexts else [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    assert torch.equal(anchor_rewards(divergence, mask, 0.5, of_contexts=of_contexts), -0.5 * expected)


@fixed_and_own_length
@pytest.mark.filterwarnings("ignore")
def test_the_cost_of_a_context_is_paid_one_position_before_it_and_a_sample_at_its_token(tmp_path, stops):
    world = tables(7, stops=stops)

    def rewards(name: str) -> tuple[Tensor, Scored]:
        batch = update(configuration(tmp_path, name, "reward"), world, baseline=False).batch
        later = torch.cat([batch.returns[:, 1:], torch.zeros_like(batch.returns[:, :1])], 1)
        return batch.returns - later, batch.scored

    paid, scored = rewards("exact")
    cost = torch.where(scored.loss_mask, scored.ref_kl, 0.0)
    assert_same(paid[:, :-1], -COEF * cost[:, 1:])
    assert_same(paid[:, -1], torch.zeros(len(paid), dtype=torch.float64))
    paid, scored = rewards("k1")
    assert_same(paid, torch.where(scored.loss_mask, -COEF * (scored.logp - scored.ref_logp), 0.0))


def test_paying_a_context_before_it_changes_no_expectation_and_removes_noise():
    """The cost of a context does not depend on the token after it: as a reward of that token it only adds variance."""
    responses = torch.tensor(list(itertools.product(range(V), repeat=T)))
    at, mask = contexts_of(responses)[:, :-1], torch.ones(len(responses), T, dtype=torch.bool)
    for seed in range(3):
        world = tables(seed)
        tree = Tree(world)
        taken = tree.logp[at].gather(-1, responses[..., None])[..., 0]
        probability = taken.detach().sum(1).exp()
        mean, variance = {}, {}
        for of_contexts in (True, False):
            rewards = anchor_rewards(kl(tree.logp, tree.logq).detach()[at], mask, 1.0, of_contexts=of_contexts)
            advantages = gae(rewards, torch.zeros_like(rewards), gamma=1.0, lam=1.0)
            each = torch.stack([tree.gradient(row) for row in -(advantages * taken).sum(1)])
            mean[of_contexts] = (probability[:, None, None] * each).sum(0)
            variance[of_contexts] = (probability * (each - mean[of_contexts]).square().sum((1, 2))).sum()
        assert_same(mean[True], mean[False])
        assert_same(mean[True], tree.terms("exact")["reward"])
        assert variance[True] < variance[False]


# -- by hand -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(("position", "index"), [("eos", [2, 1, 0, 0]), ("after_eos", [2, 2, 1, 0])])
def test_a_score_lands_at_the_end_of_its_response_or_one_position_later(position, index):
    assert score_index(MASK, position).tolist() == index
    scores = torch.tensor([1.0, 2.0, math.nan, 4.0])
    rewards = place_scores(scores, MASK, position)
    expected = torch.zeros(4, 3)
    expected[0, index[0]], expected[1, index[1]] = 1.0, 2.0
    assert torch.equal(rewards, expected), "a score of NaN or of an empty row gave a reward"
    trained = MASK.clone()
    for row, column in enumerate(index[:3]):
        trained[row, column] = True
    assert torch.equal(value_positions(MASK, position), trained)


def test_gae_by_hand():
    """The sum of δ = r + γV' − V, discounted by γλ = 0.25."""
    rewards, values = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.5, 1.0]])
    deltas = [0 + 0.5 * 0.5 - 1, 1 + 0.5 * 1 - 0.5, 2 - 1]
    expected = [deltas[0] + 0.25 * (deltas[1] + 0.25 * deltas[2]), deltas[1] + 0.25 * deltas[2], deltas[2]]
    torch.testing.assert_close(gae(rewards, values, gamma=0.5, lam=0.5), torch.tensor([expected]))
    torch.testing.assert_close(gae(rewards, gamma=1.0, lam=1.0), torch.tensor([[3.0, 3.0, 2.0]]))
    assert gae(rewards, values, gamma=1.0, lam=0.0).tolist() == [[-0.5, 1.5, 1.0]]


def test_with_the_anchor_off_an_infinite_divergence_costs_nothing():
    assert anchor_rewards(torch.full((1, 2), math.inf), MASK[:1, :2], 0.0, of_contexts=False).tolist() == [[0, 0]]


def test_the_anchors_part_has_the_mean_of_each_position_taken_out():
    part = torch.tensor([[1.0, 2.0], [5.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    assert anchor_part(part, mask, part, mask).tolist() == [[-2.0, 0.0], [2.0, 0.0]]
    gathered, gathered_mask = torch.cat([part, torch.ones(1, 2)]), torch.cat([mask, torch.ones(1, 2).bool()])
    torch.testing.assert_close(anchor_part(part, mask, gathered, gathered_mask)[0], torch.tensor([1 - 7 / 3, 0.5]))


def test_the_share_of_the_anchor_and_the_variance_explained_by_hand():
    mask = torch.tensor([[True, True, False]])
    anchor, advantages = torch.tensor([[1.0, -1.0, math.nan]]), torch.tensor([[4.0, 2.0, math.nan]])
    assert anchor_share(anchor, advantages, mask) == pytest.approx(2 / 8)
    assert anchor_share(anchor * 0, advantages * 0, mask) == 0.0
    returns = torch.tensor([[1.0, 3.0, math.nan]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns * 0 + 7, returns, mask) == 0.0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, returns * 0, mask) == 0.0, "returns that do not vary have no variance to explain"


# -- without a value: from the definitions, by loops over the responses ------------------------------------------------


def by_loops(rewards: list[float | None], size: int, estimator: str, scale: str) -> list[float]:
    """The advantages of GRPO and RLOO as their papers define them, with TRL's constant; None is a response without a reward."""
    everything = [reward for reward in rewards if reward is not None]
    found = []
    for i, reward in enumerate(rewards):
        group = range(i // size * size, i // size * size + size)
        others = [rewards[j] for j in group if j != i and rewards[j] is not None]
        if reward is None or not others or all(other == reward for other in others):
            found.append(0.0)
        elif estimator == "rloo":
            found.append(reward - sum(others) / len(others))
        else:
            mine = [reward, *others]
            std = {"group": statistics.stdev(mine), "batch": statistics.stdev(everything), "none": 1.0 - 1e-4}[scale]
            found.append((reward - sum(mine) / len(mine)) / (std + 1e-4))
    return found


REWARDS = {
    "all": [1.0, 2.5, -1.0, 0.25, 3.0, 3.5, 0.0, 7.0],
    "some missing": [1.0, None, -1.0, 0.25, 3.0, 3.5, None, None],
    "equal and missing": [0.1, 0.1, None, 0.1, None, 2.0, None, None],
    "one of a group": [None, None, 4.0, None, 1.0, 2.0, 4.0, 8.0],
    "none": [None] * 8,
}


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("estimator", "scale"), [("grpo", "group"), ("grpo", "batch"), ("grpo", "none"), ("rloo", "none")]
)
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_a_response_is_compared_with_the_others_of_its_prompt(rewards, estimator, scale, size):
    given = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    found = group_advantages(given, ~given.isnan(), size=size, estimator=estimator, scale=scale)
    expected = by_loops(rewards, size, estimator, scale)
    torch.testing.assert_close(found.advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    signal = [any(expected[i // size * size :][:size]) and rewards[i] is not None for i in range(8)]
    assert found.signal.tolist() == signal
    others = [sum(r is not None for r in rewards[i // size * size :][:size]) > 1 for i in range(8)]
    assert found.compared.tolist() == [
        reward is not None and more for reward, more in zip(rewards, others, strict=True)
    ]


def test_equal_rewards_have_an_advantage_of_exactly_0():
    """In float32 the mean of three rewards of 0.1 is another number, which the offset of the scale would multiply by 10,000."""
    given = torch.full((6,), 0.1)
    for estimator in BASELINES:
        for scale in ("group", "batch", "none"):
            found = group_advantages(given, given > 0, size=3, estimator=estimator, scale=scale)
            assert not found.advantages.any() and not found.signal.any()


def test_a_reward_that_is_not_finite_is_not_hidden():
    given = torch.tensor([1.0, math.inf, 2.0, 3.0])
    found = group_advantages(given, ~given.isnan(), size=2, estimator="grpo", scale="group").advantages
    assert not found[:2].isfinite().all() and found[2:].isfinite().all()
    given[1] = math.nan  # of a KL: this response has a reward
    assert group_advantages(given, torch.ones(4) > 0, size=2, estimator="rloo").advantages[:2].isnan().all()


@pytest.mark.parametrize("estimator", BASELINES)
def test_the_parts_of_the_anchor_and_the_score_add_up(estimator):
    generator = torch.Generator().manual_seed(0)
    score, pull = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    known = torch.arange(12) % 5 != 0
    found = group_advantages(score + pull, known, size=4, estimator=estimator, scale="group")
    parts = [group_part(part, known, found, size=4, estimator=estimator) for part in (score, pull)]
    torch.testing.assert_close(parts[0] + parts[1], found.advantages, rtol=0, atol=1e-12)
    assert (parts[1][known] != 0).all() and not parts[1][~known].any()


def test_every_estimator_has_its_baseline():
    assert {*BASELINES, "gae"} == {*typing.get_args(AdvantageEstimator)}
