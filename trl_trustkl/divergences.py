"""Divergences between two policies, from sampled tokens or from full distributions, in nats.

p = π is the policy that sampled, q = π_ref the other one, u = q/p their ratio at the sampled token. A divergence D_f
= E_p[f(u)] has a convex f with f(1) = 0. Adding c·(u − 1), whose mean under p is 0, does not change the expectation, and
with c = −f'(1) every sample is non-negative. This is how k3 follows from k1 (J. Schulman, "Approximating KL divergence",
2020), and the other estimators are written in the same form.

Two families:

* Estimators, `name(logp, ref_logp, **options)`: from log-probabilities of the sampled tokens, of any shape, to one sample
  of the divergence per token, of the same shape. `ESTIMATORS` holds them by name.
* Exact divergences, `EXACT[name](logits, ref_logits, **options)`: from logits [..., V] to [...]. Their values are the
  expectations of the estimators of the same names; `exact_from_logps` takes log-probabilities instead of logits.

Both compute in float32 at least and return that; float64 stays float64. Finite input never gives NaN, neither in the value
nor in the gradient; the value is +inf only where it overflows the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor

from .errors import check_options, is_finite, option_names, out_of_range, unknown_name
from .kl_ball import project_onto_kl_ball as project_onto_kl_ball  # public here

EstimatorName = Literal["k1", "k2", "k3", "abs", "forward_kl", "js", "tv", "hellinger", "chi2", "alpha"]
KLEstimatorName = Literal[EstimatorName, "exact"]
ExactName = Literal["kl", "forward_kl", "js", "tv", "hellinger", "chi2", "renyi"]
Placement = Literal["reward", "loss", "both"]
GradientKind = Literal["exact", "partial", "biased", "zero"]

# 1 + e^-40 is 1 in float64, and e^40 is within the range of float32.
_FAR = 40.0


def _wide(*tensors: Tensor) -> torch.dtype:
    """The common dtype, float32 at least."""
    return reduce(torch.promote_types, (each.dtype for each in tensors), torch.float32)


def _log_u(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The log of q/p at the sampled tokens, subtracted in float32 at least, as half precision loses small differences."""
    dtype = _wide(logp, ref_logp)
    return ref_logp.to(dtype) - logp.to(dtype)


def _log_mean_with_one(x: Tensor) -> Tensor:
    """The log of (1 + e^x)/2, exact near 0, and x − log 2 beyond the range of e^x."""
    return torch.log1p(torch.expm1(x.clamp(-_FAR, _FAR)) / 2) + (x - _FAR).clamp(min=0)


# -- Estimators --------------------------------------------------------------------------------------------------------


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """−log u: unbiased for KL(π‖π_ref), of either sign (Schulman 2020).

    >>> k1(logp=torch.tensor([-1.0, -2.0]), ref_logp=torch.tensor([-2.0, -1.5]))
    tensor([ 1.0000, -0.5000])
    """
    return -_log_u(logp, ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½(log u)²: biased for KL(π‖π_ref), correct to second order, ≥ 0 (Schulman 2020)."""
    return _log_u(logp, ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(u − 1) − log u: unbiased for KL(π‖π_ref), ≥ 0 (Schulman 2020).

    >>> k3(logp=torch.tensor([-1.0, -2.0]), ref_logp=torch.tensor([-2.0, -1.5]))
    tensor([0.3679, 0.1487])
    """
    x = _log_u(logp, ref_logp)
    return torch.expm1(x) - x


def abs(logp: Tensor, ref_logp: Tensor) -> Tensor:  # TRL's name; this module does not use the builtin
    """|log u|: the mean absolute log-ratio under π. Not an f-divergence of the KL family, but ≥ 0 and robust."""
    return _log_u(logp, ref_logp).abs()


def forward_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(u log u) − (u − 1): unbiased for KL(π_ref‖π), the forward direction, from samples of π; ≥ 0."""
    # (u − 1)(log u − 1) + log u, which neither cancels near u = 1 nor becomes inf − inf. Below the clamp the value is 1 to
    # within e^-100; without it, (−1)(log u − 1) + log u would lose that 1 to rounding.
    x = _log_u(logp, ref_logp).clamp(min=-100.0)
    return torch.expm1(x) * (x - 1) + x


def js(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½[u log u − (1 + u) log((1 + u)/2)]: unbiased for the Jensen-Shannon divergence, which is at most log 2; ≥ 0."""
    x = _log_u(logp, ref_logp)
    return -(x.exp() * _log_mean_with_one(-x) + _log_mean_with_one(x)) / 2


def tv(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½|u − 1|: unbiased for the total variation distance ½Σ|p − q|; ≥ 0."""
    return torch.expm1(_log_u(logp, ref_logp)).abs() / 2


def hellinger(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½(√u − 1)²: unbiased for the squared Hellinger distance 1 − Σ√(pq); ≥ 0."""
    return torch.expm1(_log_u(logp, ref_logp) / 2).square() / 2


def chi2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(u − 1)²: unbiased for χ²(π_ref‖π) = Σ(q − p)²/p; ≥ 0. Note the direction: KL(π_ref‖π) ≤ log(1 + χ²)."""
    return torch.expm1(_log_u(logp, ref_logp)).square()


def alpha(logp: Tensor, ref_logp: Tensor, *, order: float = 0.5) -> Tensor:
    """(u^a − a·u − (1 − a))/(a(a − 1)), a = `order`: unbiased for the α-divergence (Cressie-Read form); ≥ 0.

    a → 0 gives KL(π‖π_ref), a → 1 KL(π_ref‖π), a = ½ four times the squared Hellinger distance, a = 2 half of χ².
    ConfigError if `order` is 0 or 1, where the formula is undefined: use k3 or forward_kl there.
    """
    if not is_finite(order) or order in (0, 1):
        raise out_of_range(
            "order", order, "a finite number other than 0 and 1", "k3 is the limit at 0, forward_kl at 1."
        )
    x = _log_u(logp, ref_logp)
    low, high = x.clamp(max=1.0), x.clamp(min=1.0)
    near = torch.expm1(order * low) - order * torch.expm1(low)
    # For large u both terms overflow; u(u^(a−1) − a) + (a − 1) is equal and avoids inf − inf.
    far = high.exp() * (((order - 1) * high).clamp(min=-_FAR).exp() - order) + (order - 1)
    return torch.where(x > 1, far, near) / (order * (order - 1))


Estimator = Callable[..., Tensor]

ESTIMATORS: dict[EstimatorName, Estimator] = {
    "k1": k1, "k2": k2, "k3": k3, "abs": abs, "forward_kl": forward_kl,
    "js": js, "tv": tv, "hellinger": hellinger, "chi2": chi2, "alpha": alpha,
}  # fmt: skip


# -- Exact divergences -------------------------------------------------------------------------------------------------


def _difference(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """log p − log q where p > 0 and 0 elsewhere, and the mask p > 0."""
    alive = ~logp.isneginf()
    return torch.where(alive, logp - logq, 0.0), alive


def log_ratio(logp: Tensor, logq: Tensor) -> Tensor:
    """log p − log q where p > 0, and 0 elsewhere."""
    return _difference(logp, logq)[0]


def _kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """The terms p·d + q − p of a KL, for d = log(p/q) (any finite number where p = 0): non-negative, 0 at equality.

    Σ p·d has the rounding error of Σp = Σq = 1, which dominates it near equality. Where p and q are close, q − p is
    computed from d; elsewhere e^-d may overflow.
    """
    close = d.clamp(-1.0, 1.0)
    return torch.where((p > 0) & (d.abs() <= 1), p * (torch.expm1(-close) + close), q - p + p * d)


def kl_between(logp: Tensor, logq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of two distributions [..., V], to [...], for a caller that has both the probabilities and their logarithms."""
    return _kl_terms(p, q, log_ratio(logp, logq)).sum(-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return kl_between(logp, logq, logp.exp(), logq.exp())


def _js(logp: Tensor, logq: Tensor) -> Tensor:
    p, q = logp.exp(), logq.exp()
    dead_p, dead_q = logp.isneginf(), logq.isneginf()
    x = torch.where(dead_p & dead_q, 0.0, logq - logp)
    # log(m/p) and log(m/q) for the mean m of the two
    above_p = torch.where(dead_p, 0.0, _log_mean_with_one(x))
    above_q = torch.where(dead_q, 0.0, _log_mean_with_one(-x))
    return (_kl_terms(p, (p + q) / 2, -above_p) + _kl_terms(q, (p + q) / 2, -above_q)).sum(-1) / 2


def _tv(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def _hellinger(logp: Tensor, logq: Tensor) -> Tensor:
    return ((logp / 2).exp() - (logq / 2).exp()).square().sum(-1) / 2


def _chi2(logp: Tensor, logq: Tensor) -> Tensor:
    x, alive = _difference(logq, logp)
    p, q = logp.exp(), logq.exp()
    close = p * torch.expm1(x.clamp(-1.0, 1.0)).square()
    return torch.where(alive & (x.abs() <= 1), close, (logq + x).exp() - 2 * q + p).sum(-1)


def _renyi(logp: Tensor, logq: Tensor, *, order: float = 0.5) -> Tensor:
    if not is_finite(order) or order <= 0 or order == 1:
        raise out_of_range("order", order, "a finite number above 0 other than 1", "'kl' is the limit at 1.")
    d, _ = _difference(logp, logq)
    # The normaliser is 0 up to rounding; subtracting it makes equal policies give 0 to the bit.
    return (torch.logsumexp(logp + (order - 1) * d, -1) - torch.logsumexp(logp, -1)) / (order - 1)


_FROM_LOGPS: dict[ExactName, Callable[..., Tensor]] = {
    "kl": _kl, "forward_kl": lambda logp, logq: _kl(logq, logp), "js": _js, "tv": _tv, "hellinger": _hellinger,
    "chi2": _chi2, "renyi": _renyi,
}  # fmt: skip


def exact_from_logps(name: str, logps: Tensor, ref_logps: Tensor, **options: float) -> Tensor:
    """The divergence `name` between two normalised log-distributions [..., V], to [...] in nats.

    kl: KL(π‖π_ref) · forward_kl: KL(π_ref‖π) · js ∈ [0, log 2] · tv ∈ [0, 1] · hellinger: squared, ∈ [0, 1] · chi2:
    χ²(π_ref‖π) · renyi(order=0.5): D_order(π‖π_ref) = log E_π[(π/π_ref)^(order − 1)]/(order − 1).

    An entry of −inf is a token with probability 0; where only one policy excludes it, kl, forward_kl, chi2 and renyi
    may be +inf, by their definitions. Computed in float32 at least. ConfigError for an unknown name or option, and for an
    order out of range.
    """
    if name not in _FROM_LOGPS:
        raise unknown_name("divergence", name, _FROM_LOGPS)
    function = _FROM_LOGPS[name]
    check_options("divergence options", name, option_names(function), options)
    dtype = _wide(logps, ref_logps)
    return function(logps.to(dtype), ref_logps.to(dtype), **options)


def exact(name: str, logits: Tensor, ref_logits: Tensor, **options: float) -> Tensor:
    """The divergence `name` between softmax(logits) and softmax(ref_logits), [..., V] to [...]; see `exact_from_logps`.

    Both are normalised in float32 at least.

    >>> exact("kl", logits=torch.tensor([0.5, 0.5]).log(), ref_logits=torch.tensor([0.9, 0.1]).log())
    tensor(0.5108)
    """
    logps, ref_logps = (torch.log_softmax(each, -1, dtype=_wide(each)) for each in (logits, ref_logits))
    return exact_from_logps(name, logps, ref_logps, **options)


EXACT: dict[ExactName, Callable[..., Tensor]] = {name: partial(exact, name) for name in _FROM_LOGPS}


# -- The gradient of each as a penalty ---------------------------------------------------------------------------------

_OWN_DIVERGENCE: dict[Placement, GradientKind] = {"reward": "biased", "loss": "biased", "both": "exact"}

_GRADIENT_KINDS: dict[str, dict[Placement, GradientKind]] = {
    "k1": {"reward": "exact", "loss": "zero", "both": "exact"},
    "k2": {"reward": "biased", "loss": "partial", "both": "biased"},
    "exact": {"reward": "partial", "loss": "partial", "both": "exact"},
}


def gradient_kind(estimator: str, placement: str) -> GradientKind:
    """How the gradient of an anchor relates to that of its divergence over responses (KL for k1, k2, k3 and exact).

    ∇E_p[k] = E[∇k] + E[k·∇log p]: a loss gives the first term, a reward the second, "both" the sum. exact: the gradient of
    the divergence · partial: one of two terms that are both needed (present or future cost only) · biased: of another
    quantity · zero: noise around 0. On-policy, at γ = λ = 1. For abs and the f-divergences, "exact" refers to their
    token-wise divergence on the contexts that the policy visits. Checked by enumeration; cf. arXiv 2506.09477, 2510.01555,
    2512.21852. ConfigError for an unknown name.
    """
    if estimator != "exact" and estimator not in ESTIMATORS:
        raise unknown_name("kl_estimator", estimator, (*ESTIMATORS, "exact"))
    if placement not in _OWN_DIVERGENCE:
        raise unknown_name("kl_placement", placement, _OWN_DIVERGENCE)
    return _GRADIENT_KINDS.get(estimator, _OWN_DIVERGENCE)[placement]


def build_estimator(name: str, options: Mapping[str, float] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The estimator `name` with its options bound: (logp, ref_logp) -> samples. ConfigError for invalid options."""
    if name not in ESTIMATORS:
        raise unknown_name("kl_estimator", name, ESTIMATORS)
    options = dict(options or {})
    check_options("kl_estimator_kwargs", name, option_names(ESTIMATORS[name]), options)
    bound = partial(ESTIMATORS[name], **options)
    bound(torch.zeros(1), torch.zeros(1))  # so that a bad value is reported here and not after the first rollout
    return bound
