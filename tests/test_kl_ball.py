"""The projection onto a ball of the KL: its optimality conditions, its gradient, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_trustkl.divergences import exact_from_logps, project_onto_kl_ball
from trl_trustkl.errors import ConfigError
from trl_trustkl.kl_ball import check_limit, outside_ball, project, tilted

torch.set_num_threads(1)

SPREADS = {
    "alike": (1.0, 1.0),
    "peaked": (8.0, 8.0),
    "very peaked": (30.0, 30.0),
    "flat": (0.1, 8.0),
    "old flat": (8.0, 0.1),
}
LIMITS = (1e-4, 1e-2, 0.05, 1.0, 10.0)


def distributions(spreads: tuple[float, float], vocabulary: int, rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """π and π_old as log-probabilities in float64, with logits of these standard deviations."""
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) * spread for spread in spreads)
    new, old = (each.log_softmax(-1) for each in logits)
    return new, old


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def bisected(logp: Tensor, old: Tensor, limit: float) -> Tensor:
    """As in the paper: π̃ ∝ exp((log π + η log π_old)/(1 + η)), with η by bisection, one row."""

    def at(log_eta: float) -> Tensor:
        share = 1 / (1 + math.exp(-log_eta))  # η/(1 + η)
        return ((1 - share) * logp + share * old).log_softmax(-1)

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(at(middle), old) > limit else (low, middle)
    return at(high)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("spreads", SPREADS)
@pytest.mark.parametrize("vocabulary", [2, 7, 50_000])
def test_the_conditions_of_optimality_hold(vocabulary, spreads, limit):
    """Those of Karush, Kuhn and Tucker: feasible; log(π̃/π) + η log(π̃/π_old) is constant with η ≥ 0; the limit is attained, or
    η = 0."""
    logp, old = distributions(SPREADS[spreads], vocabulary)
    found = project_onto_kl_ball(logp, old, limit)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)
    reached = kl(found, old)
    assert (reached <= limit * (1 + 1e-8)).all()
    outside = kl(logp, old) > limit
    assert torch.equal(found[~outside], logp[~outside])
    torch.testing.assert_close(reached[outside], torch.full_like(reached[outside], limit), rtol=1e-8, atol=0)
    for new, before, after in zip(logp[outside], old[outside], found[outside], strict=True):
        from_new, from_old = after - new, after - before
        a, b = from_new - from_new.mean(), from_old - from_old.mean()
        eta = -(a @ b) / (b @ b)
        assert eta >= 0
        assert (a + eta * b).abs().max() <= 1e-8 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("limit", [1e-3, 0.05, 1.0])
def test_it_is_that_of_a_bisection_of_the_papers_formula(limit):
    logp, old = distributions((3.0, 2.0), 11)
    assert (kl(logp, old) > limit).any()
    for new, before in zip(logp, old, strict=True):
        expected = new if kl(new, before) <= limit else bisected(new, before, limit)
        torch.testing.assert_close(project_onto_kl_ball(new, before, limit), expected, rtol=1e-9, atol=1e-9)


def test_no_distribution_within_the_limit_is_nearer():
    (logp,), (old,) = distributions((2.0, 1.0), 5, rows=1)
    limit = 0.1
    found = project_onto_kl_ball(logp, old, limit)
    draw = torch.Generator().manual_seed(1)
    others = (found + 0.3 * torch.randn(20_000, 5, generator=draw, dtype=torch.float64)).log_softmax(-1)
    feasible = others[kl(others, old) <= limit]
    assert len(feasible) > 1000
    assert (kl(feasible, logp) >= kl(found, logp)).all()


@pytest.mark.parametrize("limit", [0.01, 0.5])
def test_the_gradient_is_the_finite_difference(limit):
    """Of rows outside of the ball and inside, also with respect to log-probabilities that are not normalised."""
    logp, old = distributions((1.5, 1.0), 6, rows=6, seed=3)
    logp[0] = old[0] + 1e-3 * torch.arange(6)
    outside = kl(logp, old) > limit
    assert outside.any() and not outside.all()
    assert torch.autograd.gradcheck(lambda x: project_onto_kl_ball(x, old, limit), logp.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: project_onto_kl_ball(x.log_softmax(-1), old, limit), logp.clone().requires_grad_()
    )


def test_the_gradient_in_a_large_vocabulary_is_that_of_the_implicit_function():
    """The derivative of Σ weight·log π̃ along a direction, against a central difference."""
    logp, old = distributions((1.0, 1.0), 2_000, rows=1)
    draw = torch.Generator().manual_seed(2)
    weight, direction = (torch.randn(1, 2_000, generator=draw, dtype=torch.float64) for _ in range(2))
    leaf = logp.clone().requires_grad_()
    (weight * project_onto_kl_ball(leaf, old, 0.05)).sum().backward()

    def value(step: float) -> float:
        return float((weight * project_onto_kl_ball(logp + step * direction, old, 0.05)).sum())

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_old_log_probabilities_are_data():
    logp, old = distributions((2.0, 2.0), 5)
    old.requires_grad_()
    leaf = logp.clone().requires_grad_()
    project_onto_kl_ball(leaf, old, 0.05).sum().backward()
    assert old.grad is None and leaf.grad is not None


@pytest.mark.parametrize(("limit", "near"), [(1e-4, 2e-3), (1e-2, 1e-4), (0.05, 1e-4), (1.0, 1e-4)])
@pytest.mark.parametrize("spreads", SPREADS)
def test_single_precision_attains_the_limit_up_to_rounding(spreads, limit, near):
    logp, old = (each.float() for each in distributions(SPREADS[spreads], 50_000))
    found = project_onto_kl_ball(logp, old, limit)
    assert found.dtype is torch.float32
    reached = exact_from_logps("kl", found, old)
    outside = exact_from_logps("kl", logp, old) > limit
    assert ((reached - limit).abs()[outside] <= near * limit).all()


def test_half_precision_is_computed_in_single_precision():
    logp, old = (each.bfloat16() for each in distributions((2.0, 2.0), 9))
    found = project_onto_kl_ball(logp, old, 0.05)
    assert found.dtype is torch.float32
    assert torch.equal(found, project_onto_kl_ball(logp.float(), old.float(), 0.05))


def test_shapes():
    logp, old = distributions((2.0, 2.0), 5, rows=6)
    found = project_onto_kl_ball(logp.view(2, 3, 5), old.view(2, 3, 5), 0.05)
    assert torch.equal(found.view(6, 5), project_onto_kl_ball(logp, old, 0.05))
    one = project_onto_kl_ball(logp.view(2, 3, 5), old[0], 0.05)
    assert torch.equal(one[0, 1], project_onto_kl_ball(logp[1], old[0], 0.05))
    assert project_onto_kl_ball(logp[:0], old[:0], 0.05).shape == (0, 5)


def test_tokens_that_a_policy_excludes():
    """A token that π_old excludes cannot be in the projection; one that π excludes would make KL(π̃‖π) infinite."""
    inf = math.inf
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.9, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.1, 0.6, 0.3, 0.0]], dtype=torch.float64)
    leaf = p.log().requires_grad_()
    found = project_onto_kl_ball(leaf, q.log(), 0.2)
    assert found[0, 2] == found[0, 3] == found[1, 0] == -inf
    torch.testing.assert_close(kl(found, q.log())[1], torch.tensor(0.2, dtype=torch.float64))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found[:, 1].sum(), leaf)
    assert not gradient.isnan().any()


def test_where_no_distribution_is_within_the_limit():
    """π excludes half of π_old, so that every distribution that it allows is log 2 away; two that share nothing."""
    p = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
    leaf = p.log().requires_grad_()
    found = project_onto_kl_ball(leaf, q.log(), 0.05).exp()
    (gradient,) = torch.autograd.grad(found[1, 0], leaf, retain_graph=True)
    assert (gradient == 0).all(), "π_old does not depend on π"
    found = found.detach()
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert torch.equal(found[1], q[1])


def test_the_search_is_repeated_exactly_by_its_scale():
    """`tilted` gives the backward pass of the token statistics what the forward pass found."""
    logp, old = distributions((2.0, 2.0), 50)
    rows = outside_ball(logp, old, 0.05)
    assert len(rows) == 4
    found = project(logp, old, 0.05)
    again = tilted(logp, old, found.scale)
    for mine, other in zip(found, again, strict=True):
        assert torch.equal(mine, other)
    assert ((found.scale > 0) & (found.scale < 1)).all()


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf, "0.1", True])
def test_a_limit_that_is_not_above_0(limit):
    with pytest.raises(ConfigError, match=r"^`limit` got .*a finite number above 0, in nats"):
        project_onto_kl_ball(torch.zeros(1, 2), torch.zeros(1, 2), limit)
    with pytest.raises(ConfigError, match="^`clip_kwargs"):
        check_limit("clip_kwargs['limit']", limit)
