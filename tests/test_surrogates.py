"""Clip rules against a second implementation of each paper's formula, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from trl_trustkl.divergences import project_onto_kl_ball
from trl_trustkl.errors import ConfigError
from trl_trustkl.kl_ball import TokenProjection
from trl_trustkl.surrogates import (
    SURROGATES,
    ClipRuleName,
    Surrogate,
    build_surrogate,
    cispo,
    dppo_tv,
    drpo,
    ppo,
    troll,
)

torch.set_num_threads(1)

LOW, HIGH = 0.2, 0.35
SEQUENCE_RULES = ("gspo", "gmpo")
SOFT_RULES = (
    "none",
    "spo",
    "cispo",
    "sapo",
    "drpo",
    "troll",
)  # rules that may remove a part of a token's gradient, or nothing
OPTIONS = {
    "dual": [{}, {"c": 1.5}],
    "rollback": [{}, {"alpha": 0.02}],
    "sapo": [{}, {"tau_pos": 2.0, "tau_neg": 0.5}],
    "dppo_tv": [{}, {"delta": 0.02}],
    "dppo_kl": [{}, {"delta": 0.005}],
    "drpo": [{}, {"delta": 0.02}],
    "troll": [{}, {"limit": 0.002, "alpha": 0.3}, {"alpha": 0.0}],
}
CASES = [(name, options) for name in SURROGATES for options in OPTIONS.get(name, [{}])]


class Tokens:
    """Ratios from far below to far above the range, rows of different lengths, an empty row and zero advantages."""

    def __init__(self, seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64):
        draw = torch.Generator().manual_seed(seed)
        shape = (6, 17)
        self.old_logp = -torch.rand(shape, generator=draw, dtype=dtype) * 4 - 0.01
        log_ratio = spread * torch.randn(shape, generator=draw, dtype=dtype)
        self.log_ratio = torch.minimum(log_ratio, -0.9 * self.old_logp).requires_grad_()
        self.advantages = torch.randn(shape, generator=draw, dtype=dtype)
        self.advantages[0, ::5] = 0.0
        lengths = torch.tensor([17, 11, 1, 5, 16, 0])
        self.mask = torch.arange(shape[1]) < lengths[:, None]


def binary(logp: Tensor) -> Tensor:
    """The distribution over "this token" and "any other", [..., 2]."""
    return torch.stack([logp, torch.log1p(-logp.exp())], -1)


def binary_projection(log_ratio: Tensor, old_logp: Tensor, mask: Tensor, limit: float) -> TokenProjection:
    """Of a vocabulary of two tokens, where every gradient is along that of log π(token); garbage under a False mask."""
    old = torch.where(mask, old_logp, -1.0).double()
    logp = torch.where(mask, old.detach() + log_ratio, -1.0).double().clamp(-500.0, -1e-9)
    new, projected = binary(logp), project_onto_kl_ball(binary(logp), binary(old).detach(), limit)
    kl = (new.exp() * (new - projected.detach())).sum(-1)
    kept, pull = (torch.autograd.grad(each.sum(), logp, retain_graph=True)[0] if logp.requires_grad else logp * 0
                  for each in (projected[..., 0], kl))  # fmt: skip
    inside = (new.exp() * (new - binary(old))).sum(-1) <= limit
    kept, pull = torch.where(inside, 1.0, kept), torch.where(inside, 0.0, pull)  # without the rounding of autograd
    garbage = torch.full_like(logp, torch.nan)
    columns = (torch.where(mask, each, garbage) for each in (projected[..., 0], kl, kept, pull))
    return TokenProjection(*(each.to(torch.promote_types(log_ratio.dtype, torch.float32)) for each in columns))


# -- The papers' formulas, on tokens w, A; sequence rules also get the mask --------------------------------------------


def paper(name: str, t: Tokens, options: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(objective with the rule, objective without it) as in the paper, with plain w, min and max."""
    log_w, a = t.log_ratio, t.advantages
    w = log_w.exp()
    p, mu = (t.old_logp + log_w).exp(), t.old_logp.exp()
    clip = lambda x: torch.clamp(x, 1 - LOW, 1 + HIGH)  # noqa: E731
    mean = lambda x: (x * t.mask).sum(1, keepdim=True) / t.mask.sum(1, keepdim=True).clamp(min=1)  # noqa: E731

    def rolled(alpha: float) -> Tensor:
        f = torch.where(w < 1 - LOW, -alpha * w + (1 + alpha) * (1 - LOW), w)
        return torch.where(w > 1 + HIGH, -alpha * w + (1 + alpha) * (1 + HIGH), f)

    def gate(tau_pos: float, tau_neg: float) -> Tensor:
        tau = torch.where(a > 0, torch.tensor(tau_pos, dtype=a.dtype), torch.tensor(tau_neg, dtype=a.dtype))
        return torch.sigmoid(tau * (w - 1)) * 4 / tau

    def masked_by(divergence: Tensor, delta: float) -> Tensor:
        outward = ((a > 0) & (w > 1)) | ((a < 0) & (w < 1))
        return (~(outward & (divergence > delta))).to(a.dtype)

    bernoulli_kl = mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log()
    one_sided = torch.where(a > 0, w.clamp(max=1 + HIGH), w.clamp(min=1 - LOW))
    one_sided = torch.where(a == 0, w, one_sided)
    epsilon = torch.where(a > 0, torch.tensor(HIGH, dtype=a.dtype), torch.tensor(LOW, dtype=a.dtype))
    s = mean(log_w).detach().exp() * w / w.detach()
    g = mean(one_sided.log()).detach().exp() * one_sided / one_sided.detach()
    unclipped_g = mean(one_sided.log()).detach().exp() * w / w.detach()
    objective: dict[str, Callable[[], Tensor]] = {
        "none": lambda: w * a,
        "ppo": lambda: torch.minimum(w * a, clip(w) * a),
        "dual": lambda: torch.where(
            a < 0,
            torch.maximum(torch.minimum(w * a, clip(w) * a), options.get("c", 3.0) * a),
            torch.minimum(w * a, clip(w) * a),
        ),
        "rollback": lambda: torch.minimum(w * a, rolled(options.get("alpha", 0.3)) * a),
        "spo": lambda: w * a - a.abs() * (w - 1) ** 2 / (2 * epsilon),
        "cispo": lambda: clip(w).detach() * a * (t.old_logp + log_w),
        "sapo": lambda: gate(options.get("tau_pos", 1.0), options.get("tau_neg", 1.05)) * a,
        "gspo": lambda: torch.minimum(s * a, clip(s) * a),
        "gmpo": lambda: g * a,
        "dppo_tv": lambda: masked_by((p - mu).abs(), options.get("delta", 0.15)).detach() * w * a,
        "dppo_kl": lambda: masked_by(bernoulli_kl, options.get("delta", 0.05)).detach() * w * a,
    }
    objective["drpo"] = lambda: w * a - a.abs() * (p - mu) ** 2 / mu / (2 * options.get("delta", 0.15))
    objective["troll"] = lambda: troll_objective(t, options)
    unclipped = {"gspo": s * a, "gmpo": unclipped_g * a}.get(name, w * a)
    return objective[name](), unclipped


def troll_objective(t: Tokens, options: dict[str, float]) -> Tensor:
    """w̃·A − α·KL(π‖⌊π̃⌋) over the two outcomes, with η by bisection; its derivative by that of the KL at the solution."""
    limit, alpha = options.get("limit", 0.05), options.get("alpha", 1.0)
    old = torch.where(t.mask, t.old_logp, -1.0)
    logp = torch.where(t.mask, old + t.log_ratio, -1.0)
    new, before = binary(logp), binary(old)

    def at(share: Tensor) -> Tensor:  # share = η/(1 + η)
        return ((1 - share[..., None]) * new + share[..., None] * before).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    low, high = torch.zeros_like(logp), torch.ones_like(logp)
    with torch.no_grad():
        for _ in range(100):
            middle = (low + high) / 2
            above = kl(at(middle), before) > limit
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    share = high.requires_grad_()
    (rate,) = torch.autograd.grad(kl(at(share), before).sum(), share)
    # One step of Newton's method at the solution has the derivative of the implicit function.
    share = share.detach() - (kl(at(share.detach()), before) - limit) / rate
    outside = kl(new, before).detach() > limit
    projected = torch.where(outside[..., None], at(torch.where(outside, share, 0.5)), new)
    return (projected[..., 0] - old).exp() * t.advantages - alpha * kl(new, projected.detach())


def gradient(objective: Tensor, t: Tokens) -> Tensor:
    return torch.autograd.grad(objective[t.mask].sum(), t.log_ratio, retain_graph=True)[0]


def run(name: str, t: Tokens, options: dict[str, float], low: float = LOW, high: float = HIGH) -> Surrogate:
    return applied(name, t.log_ratio, t.advantages, t.mask, t.old_logp, low=low, high=high, options=options)


def applied(name: str, log_ratio: Tensor, advantages: Tensor, mask: Tensor, old_logp: Tensor, *, low: float = LOW,
            high: float = HIGH, options: dict[str, float] | None = None) -> Surrogate:  # fmt: skip
    rule = build_surrogate(name, low, high, options)
    projection = None if rule.limit is None else binary_projection(log_ratio, old_logp, mask, rule.limit)
    out = rule(log_ratio, advantages, mask, old_logp, projection)
    assert (out.penalty is not None) == (name == "troll")
    return out


def total(out: Surrogate) -> Tensor:
    """What is maximised."""
    return out.objective if out.penalty is None else out.objective - out.penalty


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("seed", "spread"), [(0, 0.05), (1, 0.5), (2, 2.0)])
def test_value_gradient_and_gated_against_the_paper(name, options, seed, spread):
    t = Tokens(seed, spread)
    out = run(name, t, options)
    expected, unclipped = paper(name, t, options)
    near = {"rtol": 1e-9, "atol": 1e-12} if name == "troll" else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(total(out)[t.mask], expected[t.mask], **near)
    assert (total(out)[~t.mask] == 0).all()

    expected_gradient, full = gradient(expected, t), gradient(unclipped, t)
    near = {"rtol": 1e-6, "atol": 1e-9} if name == "troll" else {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(gradient(total(out), t), expected_gradient, **near)

    counts = t.mask & (t.advantages != 0)
    gated = torch.zeros_like(full)
    gated[counts] = (1 - expected_gradient[counts] / full[counts]).clamp(0, 1)
    near = {"rtol": 1e-5, "atol": 1e-6} if name == "troll" else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(out.gated, gated, **near)
    assert not out.gated.requires_grad
    if name not in SOFT_RULES:
        assert ((out.gated == 0) | (out.gated == 1)).all()
    if name != "none" and spread > 1:  # tokens on both sides of every rule were compared
        assert (out.gated > 0.5).any()
        assert (out.gated[counts] < 0.5).any()


@pytest.mark.parametrize("name", SURROGATES)
def test_at_ratio_one_every_rule_is_the_plain_policy_gradient(name):
    t = Tokens()
    t.log_ratio = torch.zeros_like(t.advantages).requires_grad_()
    out = run(name, t, {})
    torch.testing.assert_close(gradient(total(out), t), torch.where(t.mask, t.advantages, 0.0), rtol=1e-15, atol=0)
    assert (out.gated == 0).all()


@pytest.mark.parametrize("name", SEQUENCE_RULES)
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_sequence_rules_average_to_the_papers_sequence_objective(name, spread):
    """With one advantage per response, the mean over its tokens equals the paper's J, and so does the gradient."""
    t = Tokens(3, spread)
    t.advantages = t.advantages[:, :1].expand_as(t.log_ratio).clone()
    t.advantages[0] = -0.7
    count = t.mask.sum(1).clamp(min=1)
    a = t.advantages[:, 0]
    if name == "gspo":  # eq. 5: min(s·A, clip(s)·A), s = exp(mean log w)
        s = ((t.log_ratio * t.mask).sum(1) / count).exp()
        j = torch.minimum(s * a, s.clamp(1 - LOW, 1 + HIGH) * a)
    else:  # sgn(A)·Π min(w|A|·sgn, clip(w)|A|·sgn)^(1/T)
        w = t.log_ratio.exp()
        sign = a.sign()[:, None]
        clipped = sign * torch.minimum(sign * w, sign * w.clamp(1 - LOW, 1 + HIGH))
        j = a * ((clipped.log() * t.mask).sum(1) / count).exp()
    tokenwise = run(name, t, {}).objective.sum(1) / count
    rows = t.mask.any(1)
    torch.testing.assert_close(tokenwise[rows], j[rows], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(tokenwise[rows].sum(), t.log_ratio, retain_graph=True)[0],
        torch.autograd.grad(j[rows].sum(), t.log_ratio)[0],
        rtol=1e-11,
        atol=1e-14,
    )


def test_ppo_is_a_kl_penalty_on_the_clipped_set():
    """KLip-PPO (arXiv 2606.23932): w·A − β_t·log(π_old/π), where β_t = sg(−w·A) on the clipped set and 0 elsewhere."""
    t = Tokens(5)
    w = t.log_ratio.exp()
    clipped = ((t.advantages > 0) & (w > 1 + HIGH)) | ((t.advantages < 0) & (w < 1 - LOW))
    beta = torch.where(clipped, -w * t.advantages, torch.zeros_like(w)).detach()
    penalised = w * t.advantages - beta * (-t.log_ratio)
    out = run("ppo", t, {})
    assert clipped[t.mask].any()
    assert not clipped[t.mask].all()
    torch.testing.assert_close(gradient(out.objective, t), gradient(penalised, t), rtol=1e-12, atol=1e-14)
    assert torch.equal(out.gated.bool(), clipped & t.mask)


def test_spo_has_its_optimum_at_the_end_of_the_range():
    for advantage, end in [(2.0, 1 + HIGH), (-2.0, 1 - LOW)]:
        log_ratio = torch.tensor([[math.log(end)]], dtype=torch.float64, requires_grad=True)
        a, mask = torch.full_like(log_ratio, advantage).detach(), torch.ones(1, 1, dtype=torch.bool)
        out = SURROGATES["spo"](log_ratio, a, mask, low=LOW, high=HIGH)
        out.objective.sum().backward()
        assert log_ratio.grad.item() == pytest.approx(0, abs=1e-12)
        assert out.gated.item() == pytest.approx(1, abs=1e-12)


def test_hand_computed_constants():
    """Range [0.8, 1.35]: w = 2, A = 3; w = ½, A = −4; and w = 8, A = −1 for the dual clip at 3."""
    log_ratio, a = torch.tensor([[2.0, 0.5, 8.0]]).log(), torch.tensor([[3.0, -4.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = {
        "none": [6.0, -2.0, -8.0],
        "ppo": [4.05, -3.2, -8.0],
        "dual": [4.05, -3.2, -3.0],
        "rollback": [3 * (-0.6 + 1.3 * 1.35), -4 * (-0.15 + 1.3 * 0.8), -8.0],
        "spo": [6 - 3 / 0.7, -2 - 4 * 0.25 / 0.4, -8 - 49 / 0.4],
    }
    for name, values in expected.items():
        out = SURROGATES[name](log_ratio, a, mask, low=LOW, high=HIGH)
        torch.testing.assert_close(out.objective, torch.tensor([values]), rtol=1e-6, atol=0)


def test_dppo_by_hand():
    """π_old = 0.2 → π = 0.5 is a TV of 0.3; π_old = 0.01 → π = 0.05 is a ratio of 5 and a TV of only 0.04."""
    old_logp = torch.tensor([[0.2, 0.01, 0.4, 0.4, 0.01]], dtype=torch.float64).log()
    logp = torch.tensor([[0.5, 0.05, 0.1, 0.1, 0.3]], dtype=torch.float64).log()
    a = torch.tensor([[1.0, 1.0, -1.0, 1.0, 0.0]], dtype=torch.float64)
    out = dppo_tv(
        logp - old_logp, a, torch.ones(1, 5, dtype=torch.bool), low=0.2, high=0.2, old_logp=old_logp, delta=0.2
    )
    assert out.gated.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0]]
    torch.testing.assert_close(out.objective, torch.tensor([[0.0, 5.0, 0.0, 0.25, 0.0]], dtype=torch.float64))


def test_drpo_by_hand():
    """δ = 0.2. π_old = 0.2 → π = 0.5 is beyond μ + δ, where the gradient points back; 0.01 → 0.05, a ratio of 5, keeps 80 %."""
    old_logp = torch.tensor([[0.2, 0.01, 0.4, 0.4]], dtype=torch.float64).log()
    log_ratio = torch.tensor([[0.5, 0.05, 0.3, 0.3]], dtype=torch.float64).log() - old_logp
    log_ratio.requires_grad_()
    a = torch.tensor([[1.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    out = drpo(log_ratio, a, torch.ones(1, 4, dtype=torch.bool), low=0.2, high=0.2, old_logp=old_logp, delta=0.2)
    torch.testing.assert_close(out.gated, torch.tensor([[1.0, 0.2, 0.5, 0.0]], dtype=torch.float64))
    out.objective.sum().backward()
    expected = [2.5 * (1 - 1.5), 5 * 0.8, -0.75 * 0.5, 2 * 0.75 * 1.5]
    torch.testing.assert_close(log_ratio.grad, torch.tensor([expected], dtype=torch.float64))


def test_cispo_without_old_logp_differs_by_a_constant():
    t = Tokens(1)
    arguments = {"low": LOW, "high": HIGH}
    with_logp = cispo(t.log_ratio, t.advantages, t.mask, old_logp=t.old_logp, **arguments)
    without = cispo(t.log_ratio, t.advantages, t.mask, **arguments)
    assert torch.equal(gradient(with_logp.objective, t), gradient(without.objective, t))
    assert torch.equal(with_logp.gated, without.gated)


# -- Contracts ---------------------------------------------------------------------------------------------------------


def test_dict_and_literal_agree():
    assert get_args(ClipRuleName) == tuple(SURROGATES)
    assert all(function.__name__ == name for name, function in SURROGATES.items())


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(name, dtype):
    t = Tokens(dtype=torch.float64)
    arguments = (t.log_ratio.detach().to(dtype), t.advantages.to(dtype), t.mask, t.old_logp.to(dtype))
    out = applied(name, *arguments)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for each in filter(torch.is_tensor, out):
        assert each.shape == t.mask.shape
        assert each.dtype is wide
    upcast = applied(name, arguments[0].to(wide), arguments[1].to(wide), t.mask, arguments[3].to(wide))
    assert torch.equal(out.objective, upcast.objective)
    assert torch.equal(out.gated, upcast.gated)
    assert ((out.gated >= 0) & (out.gated <= 1)).all()


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [LOW, 1.0])
def test_no_nan_for_extreme_ratios(name, dtype, low):
    sizes = (0.0, 1e-8, 5.0, 40.0, 80.0, 89.0, 200.0, 750.0, 1e5)
    log_ratio = torch.tensor([[s * d] for d in sizes for s in (1, -1)], dtype=dtype)
    for advantage in (-2.0, -1e-30, 0.0, 3.0):
        for old_logp in (0.0, -1e-9, -0.7, -30.0, -200.0):
            leaf = log_ratio.clone().requires_grad_()
            a, old = torch.full_like(log_ratio, advantage), torch.full_like(log_ratio, old_logp)
            out = applied(name, leaf, a, torch.ones_like(a, dtype=torch.bool), old, low=low)
            out.objective.sum().backward()
            for each in (*filter(torch.is_tensor, out), leaf.grad):
                assert not each.isnan().any()
            if name != "spo":  # its (w − 1)² is e^160 at 80, which overflows float32
                finite = log_ratio.abs() <= 80
                assert out.objective[finite].isfinite().all()
                assert leaf.grad[finite].isfinite().all()
            if advantage == 0:
                assert (out.objective == 0).all()
                assert (out.gated == 0).all()
                assert (leaf.grad == 0).all()


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_nothing_under_a_false_mask_is_read(name, garbage):
    t = Tokens(4)
    dirty = Tokens(4)
    dirty.log_ratio = torch.where(t.mask, t.log_ratio.detach(), garbage).requires_grad_()
    dirty.advantages = torch.where(t.mask, t.advantages, garbage)
    dirty.old_logp = torch.where(t.mask, t.old_logp, garbage)
    clean, out = run(name, t, {}), run(name, dirty, {})
    assert torch.equal(clean.objective, out.objective)
    assert torch.equal(clean.gated, out.gated)
    gradients = torch.autograd.grad(out.objective.sum(), dirty.log_ratio)[0]
    assert torch.equal(gradients, gradient(clean.objective, t))
    assert (gradients[~t.mask] == 0).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_advantages_and_old_log_probabilities_are_data(name):
    """Without detach by the caller, no gradient flows through them or through `gated`."""
    t = Tokens(2)
    out = run(name, t, {})
    t.advantages.requires_grad_()
    t.old_logp.requires_grad_()
    careless = run(name, t, {})
    assert torch.equal(careless.objective, out.objective)
    assert not careless.gated.requires_grad
    careless.objective.sum().backward()
    assert t.advantages.grad is None
    assert t.old_logp.grad is None
    assert torch.equal(t.log_ratio.grad, gradient(out.objective, t))


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high", "kwargs", "message"),
    [
        ("pppo", 0.2, 0.2, {}, r"^`clip_rule` got 'pppo'.*Did you mean 'ppo'"),
        ("ppo", -0.1, 0.2, {}, r"^`cliprange` got -0.1"),
        ("ppo", 1.1, 0.2, {}, r"^`cliprange` got 1.1"),
        ("ppo", math.nan, 0.2, {}, r"^`cliprange` got nan"),
        ("gmpo", 0.2, -0.2, {}, r"^`cliprange_high` got -0.2"),
        ("gspo", 0.2, math.inf, {}, r"^`cliprange_high` got inf"),
        ("spo", 0.0, 0.2, {}, r"^`cliprange` got 0.0.*spo"),
        ("spo", 0.2, 0.0, {}, r"^`cliprange_high` got 0.0.*spo"),
        ("ppo", 0.2, 0.2, {"c": 3.0}, r"^`clip_kwargs` got 'c', but 'ppo' takes no options"),
        ("sapo", 0.2, 0.2, {"tau_po": 3.0}, r"^`clip_kwargs` got 'tau_po'.*Did you mean 'tau_pos'"),
        ("dual", 0.2, 0.2, {"low": 3.0}, r"^`clip_kwargs` got 'low'; it must be one of 'c'"),
        ("dual", 0.2, 0.2, {"c": 1.0}, r"^`clip_kwargs\['c'\]` got 1.0; it must be a finite number above 1"),
        ("dual", 0.2, 0.2, {"c": "3"}, r"^`clip_kwargs\['c'\]` got '3'"),
        ("rollback", 0.2, 0.2, {"alpha": 0.0}, r"^`clip_kwargs\['alpha'\]` got 0.0"),
        ("sapo", 0.2, 0.2, {"tau_neg": -1.0}, r"^`clip_kwargs\['tau_neg'\]` got -1.0"),
        ("dppo_kl", 0.2, 0.2, {"delta": math.nan}, r"^`clip_kwargs\['delta'\]` got nan"),
        ("drpo", 0.2, 0.2, {"delta": 0.0}, r"^`clip_kwargs\['delta'\]` got 0.0; it must be a finite number above 0"),
        ("troll", 0.2, 0.2, {"limit": 0.0}, r"^`clip_kwargs\['limit'\]` got 0.0; .* above 0, in nats"),
        ("troll", 0.2, 0.2, {"limit": -1.0}, r"^`clip_kwargs\['limit'\]` got -1.0"),
        ("troll", 0.2, 0.2, {"alpha": -0.5}, r"^`clip_kwargs\['alpha'\]` got -0.5; it must be a finite number >= 0"),
        (
            "troll",
            0.2,
            0.2,
            {"projection": 1.0},
            r"^`clip_kwargs` got 'projection'; it must be one of 'alpha', 'limit'",
        ),
        ("ppo", 0.2, 0.2, {"limit": 0.05}, r"^`clip_kwargs` got 'limit', but 'ppo' takes no options"),
    ],
)
def test_errors_come_when_the_rule_is_built(name, low, high, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build_surrogate(name, low, high, kwargs)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "drpo"])
def test_rules_of_probabilities_need_the_old_log_probabilities(name):
    t = Tokens()
    with pytest.raises(ConfigError, match="`old_logp` got None"):
        SURROGATES[name](t.log_ratio, t.advantages, t.mask, low=0.2, high=0.2)


def test_a_rule_of_distributions_needs_their_projections():
    t = Tokens()
    with pytest.raises(ConfigError, match="`projection` got None"):
        troll(t.log_ratio, t.advantages, t.mask, low=0.2, high=0.2, old_logp=t.old_logp)
    limits = {name: build_surrogate(name, 0.2, 0.2).limit for name in SURROGATES}
    assert {name: limit for name, limit in limits.items() if limit is not None} == {"troll": 0.05}
    assert build_surrogate("troll", 0.2, 0.2, {"limit": 0.3}).limit == 0.3


def test_a_range_of_zero_and_an_open_lower_end_are_allowed():
    t = Tokens(1)
    w, a = t.log_ratio.detach().exp(), t.advantages
    closed = ppo(t.log_ratio, a, t.mask, low=0.0, high=0.0).objective
    torch.testing.assert_close(closed, torch.where(t.mask, torch.minimum(w * a, a), 0.0))
    opened = ppo(t.log_ratio, a, t.mask, low=1.0, high=HIGH).gated
    assert not opened[a < 0].any()
