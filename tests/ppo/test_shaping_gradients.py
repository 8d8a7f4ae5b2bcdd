"""The expected gradient of score and anchor together, with and without whitening, by enumeration."""

from __future__ import annotations

import pytest
import torch

from tests.enumeration import (
    CLEARLY,
    COEF,
    Tree,
    assert_same,
    contexts_of,
    every_estimator,
    every_placement,
    fixed_and_own_length,
    population,
    response_mask,
    some_scores,
    tables,
    update,
)

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)


whitenings = pytest.mark.parametrize(
    "whiten_advantages, whiten_rewards",
    [(True, False), (False, True), (True, True)],
    ids=["advantages", "rewards", "both"],
)


@whitenings
@every_placement
@every_estimator
def test_whitening_scales_score_and_anchor_alike_wherever_the_anchor_is(
    config, name, options, placement, whiten_advantages, whiten_rewards
):
    world = tables(9)
    scores = some_scores(population(world))
    plain = update(config(name, placement, kl_estimator_kwargs=options), world, scores=scores)
    args = config(
        name,
        placement,
        kl_estimator_kwargs=options,
        whiten_advantages=whiten_advantages,
        whiten_rewards=whiten_rewards,
    )
    whitened = update(args, world, scores=scores)
    assert abs(whitened.batch.advantage_scale - 1) > 0.01
    assert_same(whitened.gradient / whitened.batch.advantage_scale, plain.gradient)


@whitenings
@pytest.mark.parametrize("name", ["k1", "k3", "exact"])
def test_with_whitening_an_exact_anchor_without_a_score_points_along_the_gradient_of_the_kl(
    config, name, whiten_advantages, whiten_rewards
):
    world = tables(10)
    args = config(name, "both", whiten_advantages=whiten_advantages, whiten_rewards=whiten_rewards)
    found = update(args, world)
    assert_same(found.gradient / (COEF * found.batch.advantage_scale), Tree(world).own_divergence(name))


@whitenings
@pytest.mark.parametrize("score", [0.0, 0.7])
def test_a_batch_without_a_difference_does_not_magnify_the_anchor_in_the_loss(
    config, whiten_advantages, whiten_rewards, score
):
    """All advantages are equal: the factor 1/√(var + 1e-8) would be 10,000."""
    world = tables(10)
    args = config("k3", "loss", whiten_advantages=whiten_advantages, whiten_rewards=whiten_rewards and not score)
    scores = torch.full((len(population(world)),), score, dtype=torch.float64)
    found = update(args, world, scores=scores, baseline=False)
    assert found.batch.advantage_scale == 1.0
    plain = update(config("k3", "loss"), world, baseline=False)
    assert_same(found.gradient, plain.gradient)


@fixed_and_own_length
@pytest.mark.parametrize("score_position", ["after_eos", "eos"])
@pytest.mark.parametrize("whiten_advantages", [False, True])
def test_score_and_anchor_together_give_the_gradient_of_the_objective(config, stops, score_position, whiten_advantages):
    """It is the gradient of −E[score] + β·KL up to the factor of whitening; the mean that whitening subtracts is a baseline."""
    world = tables(11, stops=stops)
    rows = population(world)
    args = config(score_position=score_position, whiten_advantages=whiten_advantages)
    scores = some_scores(rows)
    found = update(args, world, scores=scores)
    tree = Tree(world)
    taken = tree.logp[contexts_of(rows)[:, :-1]].gather(-1, rows[..., None])[..., 0]
    likelihood = torch.where(response_mask(rows, stops), taken, 0.0).sum(1)
    of_score = tree.gradient((scores * likelihood).mean())
    assert_same(found.gradient / found.batch.advantage_scale, COEF * tree.own_divergence("exact") - of_score)


def test_whitened_rewards_pay_for_length_too_as_in_trl(config):
    """Whitening scales rewards about their mean, which stays unscaled: each token gains mean·(1 − factor)."""
    world = tables(12, stops=True)
    scores = some_scores(population(world))
    plain = update(config(score_position="eos"), world, scores=scores)
    whitened = update(config(score_position="eos", whiten_rewards=True), world, scores=scores)
    returns, mask = plain.batch.returns, plain.batch.scored.value_mask
    rewards = torch.where(mask, returns - torch.cat([returns[:, 1:], torch.zeros_like(returns[:, :1])], 1), 0.0)
    factor = whitened.batch.advantage_scale
    bonus = (1 - factor) * rewards.sum() / mask.sum()
    tree = Tree(world)
    of_length = tree.gradient(tree.reach.sum())
    assert bonus.abs() * of_length.abs().max() > CLEARLY
    assert_same(whitened.gradient, factor * plain.gradient - bonus * of_length)
