"""The gradients of the loss after the policy has moved away from the one that sampled the batch, by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.enumeration import (
    CLEARLY,
    COEF,
    TEMPERATURE,
    Cost,
    T,
    Tree,
    anchor_gradient,
    assert_same,
    definition,
    every_estimator,
    fixed_and_own_length,
    gap,
    kl,
    tables,
)

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)


class Moved:
    """A sampler and a policy that has moved away from it, in the contexts that the sampler visits."""

    def __init__(self, seed: int, length: int = T, stops: bool = False) -> None:
        self.sampler = tables(seed, length, stops)
        self.policy = tables(seed + 100, length, stops).ref
        tree = Tree(self.sampler)
        self.reach, self.logmu, self.logq = tree.reach.detach(), tree.logp.detach(), tree.logq
        self.theta = self.policy.clone().requires_grad_()
        self.logp = (self.theta / TEMPERATURE).log_softmax(-1)

    def gradient(self, of_context: Tensor) -> Tensor:
        return torch.autograd.grad((self.reach * of_context).sum(), self.theta, retain_graph=True)[0]

    def pathwise(self, weights: Tensor, cost: Cost) -> Tensor:
        return self.gradient((weights.detach() * cost(self.logp, self.logq)).sum(-1))


@fixed_and_own_length
@every_estimator
def test_the_token_ratio_makes_the_loss_term_that_of_the_policy_as_it_is_now(config, name, options, stops):
    """With the weight sg(w), E_μ[w·∇k] = E_p[∇k] in every context that the sampler visits; without it, E_μ[∇k]."""
    moved = Moved(13, stops=stops)
    args = config(name, "loss", kl_estimator_kwargs=options, kl_offpolicy=True)
    unweighted = config(name, "loss", kl_estimator_kwargs=options)
    found, biased = (
        anchor_gradient(each, moved.sampler, baseline=False, moved_to=moved.policy) for each in (args, unweighted)
    )
    if name == "exact":  # a function of the context: it needs no weight
        expected = moved.gradient(kl(moved.logp, moved.logq))
        assert_same(biased, expected)
    else:
        cost = definition("alpha-2.0" if options else name)
        expected = moved.pathwise(moved.logp.exp(), cost)
        assert_same(biased, moved.pathwise(moved.logmu.exp(), cost))
        assert gap(found, biased) > CLEARLY
    assert_same(found, expected)


@every_estimator
def test_in_a_single_step_the_weighted_loss_term_is_the_one_on_policy(config, name, options):
    moved = Moved(14, length=1)
    args = config(name, "loss", kl_estimator_kwargs=options, kl_offpolicy=True)
    found = anchor_gradient(args, moved.sampler, baseline=False, moved_to=moved.policy)
    now = Tree(moved.sampler._replace(policy=moved.policy))
    assert_same(found, now.terms("alpha-2.0" if options else name)["loss"])


@pytest.mark.parametrize("placement", ["loss", "both"])
@every_estimator
def test_the_weight_does_not_change_the_table(config, name, options, placement):
    """At w = 1 it changes nothing. A weight with a gradient would add the term of the reward to that of the loss."""
    world = tables(15)
    gradient = anchor_gradient(config(name, placement, kl_estimator_kwargs=options, kl_offpolicy=True), world)
    assert_same(gradient, Tree(world).terms("alpha-2.0" if options else name)[placement])


@fixed_and_own_length
@pytest.mark.parametrize("trust_estimator", ["exact", "k1", "k3"])
def test_every_trust_penalty_gives_the_gradient_of_the_kl_from_the_sampler(config, trust_estimator, stops):
    """E_μ[∇k] is the gradient of KL(μ‖π), for k1 and k3 too, since the expectation is over the sampler."""
    moved = Moved(16, stops=stops)
    args = config("k1", "reward", kl_coef=0.0, trust_coef=COEF, trust_estimator=trust_estimator)
    found = anchor_gradient(args, moved.sampler, baseline=False, moved_to=moved.policy)
    assert_same(found, moved.gradient(kl(moved.logmu, moved.logp)))
