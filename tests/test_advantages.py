"""Rewards of the anchor, generalised advantage estimation, and what is derived from them."""

from __future__ import annotations

import itertools
import math

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
    anchor_part,
    anchor_rewards,
    anchor_share,
    explained_variance,
    gae,
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
