"""The estimators of divergences against their textbook definitions and closed forms."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from tests import formulas
from tests.formulas import ESTIMATOR_CASES
from trl_trustkl import divergences
from trl_trustkl.divergences import (
    ESTIMATORS,
    EXACT,
    EstimatorName,
    ExactName,
    KLEstimatorName,
    build_estimator,
    exact,
    gradient_kind,
)
from trl_trustkl.errors import ConfigError

torch.set_num_threads(1)


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
    # These inputs are exact in every dtype, so that half precision must equal float32 bit for bit.
    assert torch.equal(out, ESTIMATORS[name](logp.to(wide), ref_logp.to(wide), **options))
    truth = formulas.sample(name, ref_logp.double() - logp.double(), **options)
    order = options.get("order", 0.5)  # the formula divides by order·(order − 1)
    rtol = (2e-6 if wide is torch.float32 else 1e-12) / min(1, abs(order * (order - 1)))
    np.testing.assert_allclose(out.double().numpy(), truth, rtol=rtol)


@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_estimators_are_zero_at_equality(name, options, dtype):
    logp = torch.linspace(-30, 0, 97).to(dtype)
    assert torch.all(ESTIMATORS[name](logp, logp.clone(), **options) == 0)


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
    # A constant factor of a definition, or a difference of two large terms in it, may shift the overflow by a factor of e.
    truth = formulas.sample(name, x, **options)
    within = truth < torch.finfo(dtype).max * math.exp(-2)
    assert not (value.isinf() & within).any()


@pytest.mark.parametrize("log_u", [1e-3, -1e-3, 3e-4])
@pytest.mark.parametrize(("name", "options"), ESTIMATOR_CASES)
def test_estimators_are_accurate_near_equality_in_float32(name, options, log_u):
    """Evaluated literally, u − 1 − log u has no correct digit at 1e-4."""
    x = torch.tensor([log_u])
    truth = formulas.sample(name, x, **options)
    order = options.get("order", 0.5)
    rtol = 1e-3 / min(1, abs(order * (order - 1)))
    np.testing.assert_allclose(ESTIMATORS[name](torch.zeros(1), x, **options).numpy(), truth, rtol=rtol)


@pytest.mark.parametrize("log_u", [80.0, -80.0])
def test_values_at_log_ratios_of_80(log_u):
    """In float32, where only chi2 overflows, at e^160."""
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
    if name in ("chi2", "alpha"):  # e^±90 is out of the range of finite differences
        logp, ref_logp = logp.detach()[:5].requires_grad_(), ref_logp.detach()[:5].requires_grad_()
    scale = lambda x: torch.asinh(x)  # noqa: E731  brings e^45 into the range of finite differences
    assert torch.autograd.gradcheck(lambda a, b: scale(ESTIMATORS[name](a, b, **options)), (logp, ref_logp))


@pytest.mark.parametrize("mean", [0.1, 1.0])
def test_schulmans_table_closed_forms(mean):
    """p = N(m, 1) and q = N(0, 1); the moments come from Gauss-Hermite quadrature, which is exact here."""
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
    # the published table (bias/true, std/true), to the digits that it gives
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
    """α = ½ is 4·H² (squared Hellinger), α = 2 is χ²/2, α → 0 and α → 1 are the two KLs; Rényi of order ½ is −2 log(1 − H²)."""
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


@pytest.mark.parametrize("order", [0, 1, 0.0, 1.0, math.nan, math.inf, "0.5", True])
def test_alpha_rejects_orders_without_a_formula(order):
    with pytest.raises(ConfigError, match="`order` got"):
        divergences.alpha(torch.zeros(1), torch.zeros(1), order=order)


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
