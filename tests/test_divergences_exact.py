"""The exact divergences over the vocabulary, against their textbook definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import formulas
from tests.formulas import dirichlet
from trl_trustkl.divergences import EXACT, exact, exact_from_logps
from trl_trustkl.errors import ConfigError

torch.set_num_threads(1)
RENYI_ORDERS = (0.5, 2.0, 0.1, 0.99, 5.0)
EXACT_CASES = [(name, {}) for name in EXACT] + [("renyi", {"order": a}) for a in RENYI_ORDERS]


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_reduces_the_vocabulary_and_upcasts(name, options, dtype):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(2, 3, 11, generator=generator).to(dtype) for _ in range(2))
    out = EXACT[name](logits, ref_logits, **options)
    assert out.shape == (2, 3)
    assert out.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (logits, ref_logits))
    truth = [[formulas.expectation(name, p[i, j], q[i, j], **options) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(
        out.double().numpy(),
        truth,
        rtol=(1e-12 if dtype is torch.float64 else 5e-6) / min(1, abs(1 - options.get("order", 0.5))),
    )
    assert torch.equal(out, exact(name, logits, ref_logits, **options))


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_is_zero_at_equality_to_the_bit(name, options, dtype):
    logits = (3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[0, :7] = -torch.inf
    assert torch.all(exact(name, logits, logits.clone(), **options) == 0)


@pytest.mark.parametrize(("name", "options"), EXACT_CASES)
def test_gradcheck_of_exact_divergences(name, options):
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = (
        (2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda a, b: exact(name, a, b, **options), (logits, ref_logits))


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
    assert not (d["kl"] <= torch.log1p(d["chi2"]) + slack).all() or vocab > 2  # not a theorem in the other direction
    for name in EXACT:
        assert (d[name] > 0).all()


@pytest.mark.parametrize("name", ["kl", "forward_kl", "js"])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_kl_near_equality_is_accurate_in_float32(name, size):
    """The error of a plain Σ p·log(p/q) in float32 is larger than the KL here."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 5000, generator=generator)
    ref_logits = logits + size * torch.randn(20, 5000, generator=generator)
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (logits, ref_logits))
    truth = np.array([formulas.expectation(name, a, b) for a, b in zip(p, q, strict=True)])
    out = exact(name, logits, ref_logits)
    assert (out >= 0).all()
    # log-probabilities of about 10 are rounded to 1e-6, which limits the accuracy of any formula
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


@pytest.mark.parametrize("order", [0, 1, -1.0, math.nan, math.inf])
def test_renyi_rejects_orders_without_a_formula(order):
    with pytest.raises(ConfigError, match="`order` got"):
        exact("renyi", torch.zeros(2), torch.zeros(2), order=order)
