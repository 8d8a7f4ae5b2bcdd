"""The gradient of a loss that is corrected for a sampler other than the policy, by enumeration of every response.

π is the policy and μ the sampler. The exact gradient is an expectation under π; what the trainer computes is one under μ.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumeration import (
    CLEARLY,
    COEF,
    EXACTLY,
    TEMPERATURE,
    T,
    Tables,
    Tree,
    V,
    assert_same,
    configuration,
    contexts_of,
    every_estimator,
    every_placement,
    fixed_and_own_length,
    gap,
    kl,
    population,
    sampled_logps,
    some_scores,
    tables,
    update,
)
from trl_trustkl.divergences import k2
from trl_trustkl.importance import importance_weights
from trl_trustkl.policy.exact_kl import TokenOutputs
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.ppo.losses import LossScale, Penalties, micro_loss
from trl_trustkl.surrogates import build_surrogate
from trl_trustkl.types import Batch, Rollout, Scored

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)

of_responses = pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask"])
of_tokens = pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])


@pytest.fixture
def config(tmp_path):
    """A configuration of one exact step, whose weights have no bound."""

    def made(*args: Any, mode: str = "sequence_truncate", **changes: Any) -> Any:
        fields = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": None}
        return configuration(tmp_path, *args, **changes | fields)

    return made


def sampled(
    args: Any, world: Tables, sampler: Tables, *, corrected: bool = True, scored: bool = True, **options: Any
) -> Tensor:
    """The expected gradient of one update of the policy of `world` on responses of the sampler, through all phases."""
    rows = population(sampler)
    options |= {"scores": some_scores(rows) if scored else None, "sampler": sampler.policy if corrected else None}
    return update(args, world, rows, **options).gradient


def of_vocabulary(logits: Tensor) -> Tensor:
    """log p of every token in every context, [contexts, V]."""
    return (logits / TEMPERATURE).log_softmax(-1)


# -- the ratio of a response: through the trainer's phases ---------------------------------------------------------------


@fixed_and_own_length
@of_responses
@pytest.mark.parametrize("rule", ["none", "ppo", "cispo"])
def test_with_the_ratio_of_a_response_the_gradient_is_that_of_responses_of_the_policy(config, mode, rule, stops):
    """For an advantage that depends on all tokens of the response, and for values that are a baseline."""
    args = config("k1", "reward", kl_coef=0.0, clip_rule=rule, mode=mode)
    world, sampler = (tables(seed, stops=stops) for seed in (21, 22))
    exact = update(args, world, scores=some_scores(population(world))).gradient
    assert_same(sampled(args, world, sampler), exact)
    assert gap(sampled(args, world, sampler, corrected=False), exact) > 10 * CLEARLY


@fixed_and_own_length
@every_placement
@every_estimator
def test_with_the_ratio_of_a_response_every_anchor_gives_the_term_that_its_placement_stands_for(
    config, name, options, placement, stops
):
    """An exact anchor in the loss is not weighted: its gradient is that in the contexts that the sampler visits."""
    args = config(name, placement, kl_estimator_kwargs=options)
    world, sampler = (tables(seed, stops=stops) for seed in (23, 24))
    tree = Tree(world)
    terms = tree.terms("alpha-2.0" if options else name)
    expected = terms[placement]
    if name == "exact" and placement != "reward":
        visited = Tree(sampler).reach.detach()
        in_loss = tree.gradient((visited * kl(tree.logp, tree.logq)).sum())
        expected = in_loss + (terms["reward"] if placement == "both" else 0.0)
    found = sampled(args, world, sampler, scored=False) / COEF
    assert_same(found, expected)


@pytest.mark.parametrize("trust_estimator", ["exact", "k1", "k3"])
def test_a_trust_penalty_by_an_estimator_is_that_of_the_policy_and_an_exact_one_that_of_the_contexts(
    config, trust_estimator
):
    """After the policy has moved, to the logits θ: ∇KL(π_old‖π), in the contexts that π_old or the sampler visits."""
    args = config("k1", "reward", kl_coef=0.0, trust_coef=COEF, trust_estimator=trust_estimator)
    world, sampler = tables(25), tables(26)
    theta = tables(125).ref.requires_grad_()
    visited = Tree(sampler if trust_estimator == "exact" else world).reach.detach()
    divergence = kl(Tree(world).logp.detach(), of_vocabulary(theta))
    (expected,) = torch.autograd.grad((visited * divergence).sum(), theta)
    options = {"scored": False, "baseline": False, "moved_to": theta.detach()}
    assert_same(sampled(args, world, sampler, **options) / COEF, expected)


# -- the loss itself, for any policy, sampler and advantages -------------------------------------------------------------


class Pair:
    """A random policy and a sampler whose logits differ by normal numbers of standard deviation `spread`, and all responses.

    logits, sampler: [contexts, V]. rows: [V^T, T]. probability: of each response under the policy; chance: under the sampler.
    """

    def __init__(self, seed: int, length: int, spread: float = 0.3, *, only_last: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        contexts = (V**length - 1) // (V - 1)
        self.logits = torch.randn(contexts, V, generator=draw, dtype=torch.float64)
        moves = spread * torch.randn(contexts, V, generator=draw, dtype=torch.float64)
        if only_last:
            moves[: contexts - V ** (length - 1)] = 0.0
        self.sampler = self.logits + moves
        self.rows = torch.tensor(list(itertools.product(range(V), repeat=length)))
        self.contexts = contexts_of(self.rows)[:, :-1]
        self.mask = torch.ones_like(self.rows, dtype=torch.bool)
        self.old_logp, self.sampler_logp = (sampled_logps(each, self.rows) for each in (self.logits, self.sampler))
        self.probability, self.chance = (each.sum(1).exp() for each in (self.old_logp, self.sampler_logp))
        self.of_response = torch.randn(len(self.rows), 1, generator=draw, dtype=torch.float64).expand(-1, length)
        self.of_token = torch.randn(contexts, V, generator=draw, dtype=torch.float64)
        """Advantages of a response, [V^T, T], and of a token in its context, [contexts, V]."""

    @property
    def advantages_of_tokens(self) -> Tensor:
        return self.of_token[self.contexts].gather(-1, self.rows[..., None]).squeeze(-1)

    def exact(self, advantages: Tensor) -> Tensor:
        """E_π[Σ_t A_t ∇log π_t]: the policy gradient, by its definition."""
        theta = self.logits.clone().requires_grad_()
        logp = sampled_logps(theta, self.rows)
        return torch.autograd.grad((self.probability[:, None] * advantages * logp).sum(), theta)[0]

    def estimated(
        self, advantages: Tensor, mode: str | None, penalties: Penalties | None = None, **bounds: Any
    ) -> Tensor:
        """−∇ of the expectation over responses of the sampler of the loss of one response; `mode` None: not corrected."""
        theta, weights = self.logits.clone().requires_grad_(), None
        if mode is not None:
            bounds = {"low": None, "high": None} | bounds
            weights = importance_weights(self.old_logp, self.sampler_logp, self.mask, mode, **bounds).weights
        column = torch.zeros(self.rows.shape, dtype=torch.float64)
        rollout = Rollout(self.rows[:, :1], self.mask[:, :1], self.rows, self.mask)
        scored = Scored(
            rollout, [], [], self.old_logp, column, column, column, column, self.mask, self.mask, column[:, 0], [], {},
            sampler_weights=weights,
        )  # fmt: skip
        batch = Batch(scored, advantages, column, anchor=None)
        logp, total = sampled_logps(theta, self.rows), torch.zeros(())
        for row, chance in enumerate(self.chance):
            micro = micro_batch(rollout, torch.tensor([row]))
            out = TokenOutputs(logp[row : row + 1], torch.zeros(1, self.rows.shape[1] + 1), hidden=column)
            loss, _ = micro_loss(
                out, micro, batch, LossScale(1.0, 1.0), rule=build_surrogate("none", low=0.2, high=0.2), vf_coef=0.0,
                value_range=None, penalties=penalties or Penalties(),
            )  # fmt: skip
            total = total - chance * loss
        return torch.autograd.grad(total, theta)[0]


def test_the_definition_is_the_gradient_of_the_expected_score():
    """∇E_π[score] by autograd through the probabilities of the responses."""
    pair = Pair(0, 2)
    theta = pair.logits.clone().requires_grad_()
    value = (sampled_logps(theta, pair.rows).sum(1).exp() * pair.of_response[:, 0]).sum()
    assert_same(pair.exact(pair.of_response), torch.autograd.grad(value, theta)[0])


@of_tokens
@pytest.mark.parametrize("seed", range(5))
def test_for_one_token_its_ratio_gives_the_exact_gradient(mode, seed):
    pair = Pair(seed, 1)
    exact = pair.exact(pair.of_response)
    assert_same(pair.estimated(pair.of_response, mode), exact)
    assert gap(pair.estimated(pair.of_response, None), exact) > CLEARLY


@of_responses
@pytest.mark.parametrize("seed", range(5))
def test_the_ratio_of_a_response_gives_the_exact_gradient_for_any_advantages(mode, seed):
    pair = Pair(seed, T, spread=1.0)
    for advantages in (pair.of_response, pair.advantages_of_tokens):
        assert_same(pair.estimated(advantages, mode), pair.exact(advantages))
        assert gap(pair.estimated(advantages, None), pair.exact(advantages)) > CLEARLY


@of_tokens
@pytest.mark.parametrize("seed", range(5))
def test_the_ratio_of_a_token_gives_the_gradient_in_each_context_that_the_sampler_visits(mode, seed):
    """Σ_s d_μ(s)·∇Σ_a π(a|s)·A(s, a), for an advantage of a token in its context."""
    pair = Pair(seed, T)
    advantages, theta = pair.advantages_of_tokens, pair.logits.clone().requires_grad_()
    visits = torch.zeros(len(pair.logits), dtype=torch.float64)
    for t in range(T):
        before = pair.sampler_logp[:, :t].sum(1).exp() / V ** (T - t)  # each prefix has this many rows
        visits.index_add_(0, pair.contexts[:, t], before)
    expected = torch.autograd.grad((visits * (of_vocabulary(theta).exp() * pair.of_token).sum(-1)).sum(), theta)[0]
    assert_same(pair.estimated(advantages, mode), expected)
    assert gap(pair.estimated(advantages, None), expected) > CLEARLY
    assert gap(pair.exact(advantages), expected) > CLEARLY / 10, "the contexts are those of the sampler"


@of_tokens
@pytest.mark.parametrize("seed", range(5))
def test_the_ratio_of_a_token_gives_the_exact_gradient_where_policy_and_sampler_agree_before_it(mode, seed):
    """They differ at the last token only, so that both visit the same contexts."""
    pair = Pair(seed, T, only_last=True)
    visited_last = pair.contexts[:, -1].unique()
    exact, found, plain = (
        gradient[visited_last]
        for gradient in (
            pair.exact(pair.of_response), pair.estimated(pair.of_response, mode), pair.estimated(pair.of_response, None)
        )
    )  # fmt: skip
    assert_same(found, exact)
    assert gap(plain, exact) > CLEARLY / 10
    of_token = pair.advantages_of_tokens
    assert_same(pair.estimated(of_token, mode), pair.exact(of_token))


@of_tokens
@pytest.mark.parametrize("seed", range(5))
def test_an_advantage_of_the_context_alone_adds_nothing_and_without_correction_pulls_towards_the_sampler(mode, seed):
    """A(s) is a baseline: E_π[A(s)∇log π] = 0, while E_μ[∇log π] = −∇KL(μ‖π)."""
    pair = Pair(seed, T)
    of_context = pair.of_token[:, 0][pair.contexts]
    assert pair.estimated(of_context, mode).abs().max() < EXACTLY
    one = Pair(seed, 1)
    theta = one.logits.clone().requires_grad_()
    pull = -torch.autograd.grad(kl(of_vocabulary(one.sampler), of_vocabulary(theta)).sum(), theta)[0]
    assert_same(one.estimated(torch.ones_like(one.of_response), None), pull)
    assert pull.abs().max() > CLEARLY and pair.estimated(of_context, None).abs().max() > CLEARLY


@of_tokens
def test_an_estimated_anchor_of_one_token_is_that_of_the_policy(mode):
    """k2 in the loss, whose gradient is that of KL(π‖π_ref), here to a reference whose log-probabilities are 0."""
    pair, nothing = Pair(3, 1), torch.zeros(V, 1, dtype=torch.float64)
    penalties = Penalties(anchor_coef=1.0, anchor_estimator=k2)
    theta = pair.logits.clone().requires_grad_()
    logp = of_vocabulary(theta)
    expected = -torch.autograd.grad((logp.detach().exp() * k2(logp, torch.zeros_like(logp))).sum(), theta)[0]
    assert_same(pair.estimated(nothing, mode, penalties), expected)
    assert gap(pair.estimated(nothing, None, penalties), expected) > CLEARLY


# -- where weights are truncated -----------------------------------------------------------------------------------------

CLOSER = {
    # mode and length: the smallest share of pairs whose gradient is closer with the correction, the largest median of the error
    # that is left, relative to the error without it
    ("token_truncate", 1): (0.85, 0.5),
    ("token_truncate", 3): (0.8, 0.8),
    ("sequence_truncate", 3): (0.95, 0.5),
}


@pytest.mark.parametrize(("mode", "length"), CLOSER)
def test_where_weights_are_truncated_the_gradient_is_closer_to_the_exact_one_than_without_correction(mode, length):
    pairs = [Pair(seed, length, spread=0.7) for seed in range(60)]
    bounds = {"high": 1.5}
    left = []
    for pair in pairs:
        found = importance_weights(pair.old_logp, pair.sampler_logp, pair.mask, mode, **bounds)
        if found.truncated.any():
            exact, plain = pair.exact(pair.of_response), pair.estimated(pair.of_response, None)
            corrected = pair.estimated(pair.of_response, mode, **bounds)
            left.append(float((corrected - exact).norm() / (plain - exact).norm()))
    assert len(left) > 30, "few weights were truncated"
    share, median = CLOSER[mode, length]
    assert sum(each < 1 for each in left) >= share * len(left) and statistics.median(left) <= median


@pytest.mark.parametrize("high", [1.0, 1.5, 3.0])
def test_truncation_leaves_at_most_half_of_the_largest_error_without_correction(high):
    """Over advantages of one token with |A| <= 1, times the norm of its gradient: Σ|π − μ·weight| against Σ|π − μ|."""
    for seed in range(100):
        pair = Pair(seed, 1, spread=1.0)
        weights = importance_weights(pair.old_logp, pair.sampler_logp, pair.mask, "token_truncate", high=high).weights
        left = (pair.probability - pair.chance * weights[:, 0]).abs().sum()
        assert left <= (pair.probability - pair.chance).abs().sum() / 2 + EXACTLY
