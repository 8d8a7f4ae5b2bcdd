"""Divergences against their textbook definitions, closed forms and full enumeration."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch

from tests import formulas
from trl_trustkl import divergences
from trl_trustkl.divergences import (
    ESTIMATORS,
    EXACT,
    EstimatorName,
    ExactName,
    GradientKind,
    KLEstimatorName,
    Placement,
    build_estimator,
    exact,
    exact_from_logps,
    gradient_kind,
)
from trl_trustkl.errors import ConfigError

torch.set_num_threads(1)

ALPHA_ORDERS = (0.5, 2.0, -1.0, 0.1, 3.0, 0.999)
RENYI_ORDERS = (0.5, 2.0, 0.1, 0.99, 5.0)
ESTIMATOR_CASES = [(name, {}) for name in ESTIMATORS] + [("alpha", {"order": a}) for a in ALPHA_ORDERS]
EXACT_CASES = [(name, {}) for name in EXACT] + [("renyi", {"order": a}) for a in RENYI_ORDERS]


def dirichlet(seed: int, size: int, vocab: int, concentration: float = 0.7) -> np.ndarray:
    draw = np.random.default_rng(seed).dirichlet(np.full(vocab, concentration), size=size)
    return (draw + 1e-6) / (draw + 1e-6).sum(-1, keepdims=True)


# -- Contracts: one table, a few tests for all -------------------------------------------------------------------------


def test_dicts_and_literals_agree():
    assert get_args(EstimatorName) == tuple(ESTIMATORS)
    assert get_args(KLEstimatorName) == (*ESTIMATORS, "exact")
    assert get_args(ExactName) == tuple(EXACT)
    for name, function in ESTIMATORS.items():
        assert getattr(divergences, name) is function


@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_estimators_keep_shape_and_upcast_half_precision(name, options, dtype):
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, -4.0]], dtype=dtype)
    ref_logp = torch.tensor([[-1.0, -2.5, -0.25], [-2.0, -1.0, -4.0]], dtype=dtype)
    out = ESTIMATORS[name](logp, ref_logp, **options)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert out.shape == logp.shape
    assert out.dtype is wide
    # These inputs are exact in every dtype, so half precision must give what float32 gives, to the bit.
    assert torch.equal(out, ESTIMATORS[name](logp.to(wide), ref_logp.to(wide), **options))
    truth = formulas.sample(name, ref_logp.double() - logp.double(), **options)
    order = options.get("order", 0.5)  # the formula divides by order·(order − 1)
    rtol = (2e-6 if wide is torch.float32 else 1e-12) / min(1, abs(order * (order - 1)))
    np.testing.assert_allclose(out.double().numpy(), truth, rtol=rtol)


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_reduces_the_vocabulary_and_upcasts(name, options, dtype):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(2, 3, 11, generator=generator).to(dtype) for _ in range(2))
    out = EXACT[name](logits, ref_logits, **options)
    assert out.shape == (2, 3)
    assert out.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (logits, ref_logits))
    truth = [[formulas.whole(name, p[i, j], q[i, j], **options) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(
        out.double().numpy(),
        truth,
        rtol=(1e-12 if dtype is torch.float64 else 5e-6) / min(1, abs(1 - options.get("order", 0.5))),
    )
    assert torch.equal(out, exact(name, logits, ref_logits, **options))


@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_estimators_are_zero_at_equality(name, options, dtype):
    logp = torch.linspace(-30, 0, 97).to(dtype)
    assert torch.all(ESTIMATORS[name](logp, logp.clone(), **options) == 0)


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_is_zero_at_equality_to_the_bit(name, options, dtype):
    logits = (3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[0, :7] = -torch.inf
    assert torch.all(exact(name, logits, logits.clone(), **options) == 0)


@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimators_never_nan_and_infinite_only_by_true_overflow(name, options, dtype):
    sizes = [1e-30, 1e-8, 1e-3, 0.5, 1.0, 17.0, 40.0, 80.0, 88.0, 89.0, 104.0, 300.0, 709.0, 711.0, 1e4, 1e8, 1e30]
    x = torch.tensor([s * d for d in sizes for s in (1, -1)], dtype=dtype)  # log u
    logp = torch.zeros_like(x).requires_grad_()
    value = ESTIMATORS[name](logp, x, **options)
    value.sum().backward()
    assert not value.isnan().any()
    assert not logp.grad.isnan().any()
    if name != "k1":
        assert (value >= -1e-6).all()  # rounding only
    # A constant factor of the definition, or its subtraction of two large terms, may bring another unit of the logarithm.
    truth = formulas.sample(name, x, **options)
    within = truth < torch.finfo(dtype).max * math.exp(-2)
    assert not (value.isinf() & within).any()


@pytest.mark.parametrize("log_u", [1e-3, -1e-3, 3e-4])
@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
def test_estimators_are_accurate_near_equality_in_float32(name, options, log_u):
    """u − 1 − log u taken literally has no correct digit left at 1e-4."""
    x = torch.tensor([log_u])
    truth = formulas.sample(name, x, **options)
    order = options.get("order", 0.5)
    rtol = 1e-3 / min(1, abs(order * (order - 1)))
    np.testing.assert_allclose(ESTIMATORS[name](torch.zeros(1), x, **options).numpy(), truth, rtol=rtol)


@pytest.mark.parametrize("log_u", [80.0, -80.0])
def test_values_at_log_ratios_of_80(log_u):
    """In float32; chi2 at e^80 squared is the only one of the defaults that no longer fits."""
    one = torch.zeros(1)
    for name in ESTIMATORS:
        value = ESTIMATORS[name](one, one + log_u).item()
        if name == "chi2" and log_u > 0:
            assert value == math.inf
        else:
            assert value == pytest.approx(float(formulas.sample(name, torch.tensor(log_u))), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
def test_gradcheck_of_estimators(name, options):
    logp = torch.tensor([-1.0, -2.0, -3.0, -0.2, -5.0, -46.0, -0.1], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([-1.3, -0.5, -3.001, -4.0, -0.9, -1.0, -44.0], dtype=torch.float64, requires_grad=True)
    if name in ("chi2", "alpha"):  # e^±90 is beyond finite differences there
        logp, ref_logp = logp.detach()[:5].requires_grad_(), ref_logp.detach()[:5].requires_grad_()
    scale = lambda x: torch.asinh(x)  # noqa: E731  brings e^45 into the range of finite differences
    assert torch.autograd.gradcheck(lambda a, b: scale(ESTIMATORS[name](a, b, **options)), (logp, ref_logp))


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
def test_gradcheck_of_exact_divergences(name, options):
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = (
        (2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda a, b: exact(name, a, b, **options), (logits, ref_logits))


# -- Closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.1, 1.0])
def test_schulmans_table_closed_forms(mean):
    """With p = N(m, 1), q = N(0, 1); moments through the estimators by Gauss-Hermite quadrature, exact for these."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = torch.from_numpy(weights / weights.sum())
    x = torch.from_numpy(nodes) + mean
    logp, ref_logp = -((x - mean) ** 2) / 2, -(x**2) / 2
    true = mean**2 / 2

    def moments(name):
        sample = ESTIMATORS[name](logp, ref_logp)
        first = (weights * sample).sum().item()
        return first / true, math.sqrt((weights * (sample - first) ** 2).sum().item()) / true

    expected = {
        "k1": (1.0, 2 / mean),
        "k2": (1 + mean**2 / 4, math.sqrt(2 + mean**2)),
        "k3": (1.0, math.sqrt(math.expm1(mean**2) - mean**2) / (mean**2 / 2)),
    }
    for name, (bias, std) in expected.items():
        got = moments(name)
        assert got[0] == pytest.approx(bias, rel=1e-12)
        assert got[1] == pytest.approx(std, rel=1e-12)
    # and the table as published (bias/true, std/true), to the digits it prints
    table = {
        0.1: {"k1": (0, 20), "k2": (0.002, 1.42), "k3": (0, 1.42)},
        1.0: {"k1": (0, 2), "k2": (0.25, 1.73), "k3": (0, 1.7)},
    }
    for name, (bias, std) in table[mean].items():
        assert moments(name)[0] - 1 == pytest.approx(bias, abs=6e-4)
        assert moments(name)[1] == pytest.approx(std, rel=5e-3)


@pytest.mark.parametrize("mean", [0.1, 1.0])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_schulmans_table_by_sampling(name, mean):
    count = 200_000
    x = torch.randn(count, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + mean
    sample = ESTIMATORS[name](-((x - mean) ** 2) / 2, -(x**2) / 2)
    expected = mean**2 / 2 * (1 + mean**2 / 4 if name == "k2" else 1)
    assert sample.mean().item() == pytest.approx(expected, abs=5 * sample.std().item() / math.sqrt(count))


def test_relations_between_orders():
    """α = ½ is four times squared Hellinger, α = 2 half of χ², α → 0 and 1 the two KLs; Rényi ½ is −2 log(1 − H²)."""
    logp = torch.linspace(-6, -0.1, 40, dtype=torch.float64)
    ref_logp = logp.flip(0)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)  # noqa: E731
    close(divergences.alpha(logp, ref_logp, order=0.5), 4 * divergences.hellinger(logp, ref_logp))
    close(divergences.alpha(logp, ref_logp, order=2.0), divergences.chi2(logp, ref_logp) / 2)
    close(divergences.alpha(logp, ref_logp, order=1e-6), divergences.k3(logp, ref_logp))
    close(divergences.alpha(logp, ref_logp, order=1 - 1e-6), divergences.forward_kl(logp, ref_logp))
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(exact("renyi", *logits), -2 * torch.log(1 - exact("hellinger", *logits)))
    close(exact("renyi", *logits, order=1 + 1e-7), exact("kl", *logits))


# -- Full enumeration on a tiny autoregressive policy ------------------------------------------------------------------

V, T = 3, 3
SEQUENCES = list(itertools.product(range(V), repeat=T))
CONTEXTS = [prefix for t in range(T) for prefix in itertools.product(range(V), repeat=t)]


def tiny_policies(seed: int) -> tuple[dict, dict]:
    """Two policies: for each of the 13 contexts, the distribution of the next token."""
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

    # E_p Σ_t f(u_t) = Σ over contexts of the chance to visit it times the divergence there
    visited = sum(sequence_probability(p, c) * formulas.whole(name, p[c], q[c], **options) for c in CONTEXTS)
    samples = formulas.sample(name, ref_logps - logps, **options).sum(1).numpy()
    assert mean == pytest.approx(visited, rel=1e-10)
    assert variance == pytest.approx(float(probability @ samples**2 - (probability @ samples) ** 2), rel=1e-8)
    if name in ("k1", "k3"):  # unbiased for the KL between the distributions of whole responses
        whole = sum(
            sequence_probability(p, y) * math.log(sequence_probability(p, y) / sequence_probability(q, y))
            for y in SEQUENCES
        )
        assert mean == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_exact_kl_on_visited_contexts_is_unbiased_with_less_variance_than_k1(seed):
    """Rao-Blackwell (arXiv 2504.10637): the sum of exact per-context KLs has the sequence KL as its mean."""
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


# -- Orderings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "concentration"), [(2, 0.3), (5, 1.0), (50, 0.1), (50, 5.0)])
def test_orderings_on_random_distributions(vocab, concentration):
    logp = torch.from_numpy(np.log(dirichlet(0, 500, vocab, concentration)))
    logq = torch.from_numpy(np.log(dirichlet(1, 500, vocab, concentration)))
    d = {name: exact(name, logp, logq) for name in EXACT}
    slack = 1e-12
    assert (d["tv"] <= (d["kl"] / 2).sqrt() + slack).all()  # Pinsker
    assert (d["tv"] <= 1 - 0.5 * (-d["kl"]).exp() + slack).all()  # Bretagnolle-Huber
    assert (d["hellinger"] <= d["tv"] + slack).all()
    assert (d["tv"] <= (2 * d["hellinger"]).sqrt() + slack).all()
    assert (d["forward_kl"] <= torch.log1p(d["chi2"]) + slack).all()
    assert (d["js"] <= math.log(2) + slack).all()
    assert (d["renyi"] <= d["kl"] + slack).all()  # Rényi grows with its order, which is ½ here
    assert (d["kl"] <= exact("renyi", logp, logq, order=2.0) + slack).all()
    assert not (d["kl"] <= torch.log1p(d["chi2"]) + slack).all() or vocab > 2  # the other direction is no theorem
    for name in EXACT:
        assert (d[name] > 0).all()


# -- Numerics of the exact divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "forward_kl", "js"])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_kl_near_equality_is_accurate_in_float32(name, size):
    """A plain Σ p·log(p/q) in float32 is off by more than the KL itself here."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 5000, generator=generator)
    ref_logits = logits + size * torch.randn(20, 5000, generator=generator)
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (logits, ref_logits))
    truth = np.array([formulas.whole(name, a, b) for a, b in zip(p, q, strict=True)])
    out = exact(name, logits, ref_logits)
    assert (out >= 0).all()
    # log-probabilities of about 10 are rounded to 1e-6, which bounds what any formula can do with them
    np.testing.assert_allclose(out.numpy(), truth, rtol=4e-6 / size, atol=1e-11)


def test_tokens_excluded_by_the_policy_contribute_nothing():
    inf = torch.inf
    logits = torch.tensor([0.3, -1.0, -inf, 0.5, -inf], dtype=torch.float64, requires_grad=True)
    ref_logits = torch.tensor([0.1, 0.2, 1.0, -0.5, -inf], dtype=torch.float64, requires_grad=True)
    p, q = (torch.softmax(x.detach(), -1).numpy() for x in (logits, ref_logits))
    some = p > 0
    m = (p + q) / 2
    truth = {
        "kl": np.sum(p[some] * np.log(p[some] / q[some])),
        "js": 0.5 * np.sum(p[some] * np.log(p[some] / m[some])) + 0.5 * np.sum(q[:4] * np.log(q[:4] / m[:4])),
        "tv": 0.5 * np.abs(p - q).sum(),
        "hellinger": 1 - np.sqrt(p * q).sum(),
        "renyi": -2 * np.log(np.sqrt(p * q).sum()),
        "forward_kl": math.inf,
        "chi2": math.inf,
    }
    for name, expected in truth.items():
        out = exact(name, logits, ref_logits)
        assert out.item() == pytest.approx(expected, rel=1e-12), name
        if math.isfinite(expected):
            gradients = torch.autograd.grad(out, (logits, ref_logits))
            assert all(g.isfinite().all() for g in gradients), name


def test_divergence_is_infinite_where_the_reference_excludes_what_the_policy_does():
    logits, ref_logits = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])
    assert exact("kl", logits, ref_logits) == math.inf
    assert exact("renyi", logits, ref_logits, order=2.0) == math.inf
    assert exact("forward_kl", logits, ref_logits).item() == pytest.approx(math.log(2))
    assert exact("renyi", torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])) == math.inf


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
@pytest.mark.parametrize("size", [80.0, 300.0, 1e4])
def test_exact_gradients_are_never_nan_for_finite_logits(name, options, size):
    logits = torch.tensor([[0.0, size, -size], [size, 0.0, 1.0]], requires_grad=True)
    ref_logits = torch.tensor([[0.0, -size, size], [size, 0.0, 1.0]], requires_grad=True)
    out = exact(name, logits, ref_logits, **options)
    assert not out.isnan().any()
    if out.isfinite().all():
        out.sum().backward()
        assert not logits.grad.isnan().any()
        assert not ref_logits.grad.isnan().any()


def test_exact_from_logps_is_what_exact_calls():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    logps = logits.log_softmax(-1)
    for name in EXACT:
        assert torch.equal(exact_from_logps(name, logps[0], logps[1]), exact(name, logits[0], logits[1]))


# -- The gradient table, by enumeration --------------------------------------------------------------------------------


def gradients_by_enumeration(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """∇ of the estimator's own divergence, and what the two placements give in expectation, on the tiny policy."""
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
    if kind == "partial":  # the present-cost term of the exact KL, or the other of the two
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


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 0.0, 1.0, math.nan, math.inf, "0.5", True])
def test_alpha_rejects_orders_without_a_formula(order):
    with pytest.raises(ConfigError, match="`order` got"):
        divergences.alpha(torch.zeros(1), torch.zeros(1), order=order)


@pytest.mark.parametrize("order", [0, 1, -1.0, math.nan, math.inf])
def test_renyi_rejects_orders_without_a_formula(order):
    with pytest.raises(ConfigError, match="`order` got"):
        exact("renyi", torch.zeros(2), torch.zeros(2), order=order)


def test_errors_name_the_field_and_the_nearest_name():
    zero = torch.zeros(2)
    with pytest.raises(ConfigError, match="Did you mean 'forward_kl'"):
        exact("forwardkl", zero, zero)
    with pytest.raises(ConfigError, match="'tv' takes no options"):
        exact("tv", zero, zero, order=2.0)
    with pytest.raises(ConfigError, match="`kl_estimator` got 'k4'"):
        gradient_kind("k4", "loss")
    with pytest.raises(ConfigError, match=r"`kl_placement` got 'los'.*Did you mean 'loss'"):
        gradient_kind("k1", "los")
    with pytest.raises(ConfigError, match=r"`kl_estimator_kwargs` got 'ordr'.*Did you mean 'order'"):
        build_estimator("alpha", {"ordr": 2.0})
    with pytest.raises(ConfigError, match="`kl_estimator_kwargs` got 'order', but 'k1' takes no options"):
        build_estimator("k1", {"order": 2.0})
    with pytest.raises(ConfigError, match="`order` got 1"):
        build_estimator("alpha", {"order": 1})
    assert torch.equal(
        build_estimator("alpha", {"order": 2.0})(zero, zero - 1), divergences.alpha(zero, zero - 1, order=2.0)
    )


def test_an_estimator_of_ones_own_has_the_gradient_of_its_own_divergence(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "mine", ESTIMATORS["k3"])
    assert [gradient_kind("mine", placement) for placement in ("reward", "loss", "both")] == [
        "biased",
        "biased",
        "exact",
    ]
    with pytest.raises(ConfigError, match="`kl_estimator` got 'yours'.*'mine'"):
        gradient_kind("yours", "both")
