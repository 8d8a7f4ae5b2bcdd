"""Estimators and their gradients against an enumeration of all responses of a tiny autoregressive policy."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch

from tests import formulas
from tests.formulas import ESTIMATOR_CASES, dirichlet
from trl_trustkl.divergences import ESTIMATORS, GradientKind, KLEstimatorName, Placement, exact, gradient_kind
from trl_trustkl.errors import ConfigError

torch.set_num_threads(1)


V, T = 3, 3
SEQUENCES = list(itertools.product(range(V), repeat=T))
CONTEXTS = [prefix for t in range(T) for prefix in itertools.product(range(V), repeat=t)]


def tiny_policies(seed: int) -> tuple[dict, dict]:
    """Two policies: the distribution of the next token in each of the 13 contexts."""
    p, q = dirichlet(seed, len(CONTEXTS), V, 2.0), dirichlet(seed + 100, len(CONTEXTS), V, 2.0)
    return dict(zip(CONTEXTS, p, strict=True)), dict(zip(CONTEXTS, q, strict=True))


def sequence_probability(policy: dict, sequence: tuple) -> float:
    return float(np.prod([policy[sequence[:t]][sequence[t]] for t in range(len(sequence))]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
def test_expectation_and_variance_by_enumeration(name, options, seed):
    p, q = tiny_policies(seed)
    logps = torch.tensor([[math.log(p[y[:t]][y[t]]) for t in range(T)] for y in SEQUENCES], dtype=torch.float64)
    ref_logps = torch.tensor([[math.log(q[y[:t]][y[t]]) for t in range(T)] for y in SEQUENCES], dtype=torch.float64)
    probability = np.array([sequence_probability(p, y) for y in SEQUENCES])
    assert probability.sum() == pytest.approx(1)

    per_response = ESTIMATORS[name](logps, ref_logps, **options).sum(1).numpy()
    mean = float(probability @ per_response)
    variance = float(probability @ (per_response - mean) ** 2)

    # E_p Σ_t f(u_t) = Σ over contexts of P(context) times the divergence in it
    visited = sum(sequence_probability(p, c) * formulas.expectation(name, p[c], q[c], **options) for c in CONTEXTS)
    samples = formulas.sample(name, ref_logps - logps, **options).sum(1).numpy()
    assert mean == pytest.approx(visited, rel=1e-10)
    assert variance == pytest.approx(float(probability @ samples**2 - (probability @ samples) ** 2), rel=1e-8)
    if name in ("k1", "k3"):  # unbiased for the KL between the distributions of responses
        of_responses = sum(
            sequence_probability(p, y) * math.log(sequence_probability(p, y) / sequence_probability(q, y))
            for y in SEQUENCES
        )
        assert mean == pytest.approx(of_responses, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_exact_kl_on_visited_contexts_is_unbiased_with_less_variance_than_k1(seed):
    """Rao-Blackwell (arXiv 2504.10637): the mean of the sum of the exact KLs per context is the KL of the sequence."""
    p, q = tiny_policies(seed)
    probability = np.array([sequence_probability(p, y) for y in SEQUENCES])
    ref_probability = np.array([sequence_probability(q, y) for y in SEQUENCES])
    k1 = np.log(probability / ref_probability)

    def log(policy):
        return torch.tensor(np.log([[policy[y[:t]] for t in range(T)] for y in SEQUENCES]))

    rb = exact("kl", log(p), log(q)).sum(1).numpy()
    truth = float(probability @ k1)
    assert float(probability @ rb) == pytest.approx(truth, rel=1e-12)
    assert float(probability @ (rb - truth) ** 2) <= float(probability @ (k1 - truth) ** 2)


# -- The gradient table --------------------------------------------------------------------------------------------------


def gradients_by_enumeration(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """∇ of the estimator's divergence, and the expected gradient of each placement, for the tiny policy."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(len(CONTEXTS), V, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(len(CONTEXTS), V, generator=generator, dtype=torch.float64).log_softmax(-1)
    index = torch.tensor([[CONTEXTS.index(y[:t]) for t in range(T)] for y in SEQUENCES])
    tokens = torch.tensor(SEQUENCES)
    logps, gather = theta.log_softmax(-1), lambda x: x[index].gather(-1, tokens[..., None])[..., 0]
    logp, ref_logp = gather(logps), gather(ref)
    cost = exact("kl", theta, ref)[index] if name == "exact" else ESTIMATORS[name](logp, ref_logp)
    weight = logp.sum(1).exp()

    kl_names = ("k1", "k2", "k3", "exact")
    divergence = (weight * (logp - ref_logp).sum(1)).sum() if name in kl_names else (weight * cost.sum(1)).sum()
    grad = lambda x: torch.autograd.grad(x, theta, retain_graph=True)[0]  # noqa: E731
    to_go = cost.detach().flip(1).cumsum(1).flip(1)
    out = {
        "divergence": grad(divergence),
        "reward": grad((weight.detach()[:, None] * to_go * logp).sum()),
        "loss": grad((weight.detach()[:, None] * cost).sum()),
    }
    return out | {"both": out["reward"] + out["loss"]}


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("name", get_args(KLEstimatorName))
def test_gradient_kinds_hold_on_a_tiny_policy(name, placement):
    g = gradients_by_enumeration(name)
    kind = gradient_kind(name, placement)
    error = ((g[placement] - g["divergence"]).norm() / g["divergence"].norm()).item()
    assert kind in get_args(GradientKind)
    assert (kind == "exact") == (error < 1e-12)
    assert (kind == "zero") == (g[placement].norm().item() < 1e-12)
    if kind == "partial":  # the present-cost term of the exact KL, or its future-cost term
        exact_terms = gradients_by_enumeration("exact")
        assert any(torch.allclose(g[placement], exact_terms[term], atol=1e-12) for term in ("loss", "reward"))
    if kind == "biased":
        assert error > 0.01


def test_gradient_kind_is_the_published_table():
    expected = {
        "k1": ("exact", "zero", "exact"),
        "k2": ("biased", "partial", "biased"),
        "k3": ("biased", "biased", "exact"),
        "exact": ("partial", "partial", "exact"),
    }
    for name in get_args(KLEstimatorName):
        row = expected.get(name, ("biased", "biased", "exact"))
        assert tuple(gradient_kind(name, placement) for placement in ("reward", "loss", "both")) == row


def test_a_custom_estimator_has_the_gradient_of_its_divergence(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "mine", ESTIMATORS["k3"])
    assert [gradient_kind("mine", placement) for placement in ("reward", "loss", "both")] == [
        "biased",
        "biased",
        "exact",
    ]
    with pytest.raises(ConfigError, match="`kl_estimator` got 'yours'.*'mine'"):
        gradient_kind("yours", "both")
