"""Clip rules: objectives of a policy update, token by token, that limit the gain from tokens that have already moved.

`rule(log_ratio, advantages, mask, *, low, high, old_logp=None, **options) -> Surrogate(objective, gated)`, all [B, T].
w = exp(log_ratio) = π/π_old at the sampled token, A its advantage, and the range of w is [1 − low, 1 + high]. The
objective is maximised. It is 0 where the mask is False; inputs there are ignored. At w = 1 the gradient of every rule is
A·∇log π, the plain policy gradient. ConfigError for a range or an option that the rule rejects.

`gated` is the share of a token's gradient that the rule removed: clamp(1 − g/g', 0, 1), with g = ∂objective/∂log_ratio
and g' the same without the rule, w·A. For the sequence rules (gspo, gmpo) g' keeps the sequence's weight, so that
`gated` is about the range only. Each rule computes it together with its objective. It carries no gradient, and is 0 where
A = 0.

A rule of distributions (troll) gets the `projection` of each token's distribution too; the forward pass computes it for
the rule's `limit`. Its gradient has a component that log_ratio does not determine, and g is the component along ∇log π.

No rule here bounds the policy: at w = 1 each of them passes the full gradient, and the optimizer determines the length of
the step. They only gate the gradient of tokens that have already moved.

Computed in float32 at least. The range is applied to log_ratio, so that w is never clipped after it has overflowed: for
log-ratios of ±80 nothing is NaN, and beyond the dtype's range only an objective that is itself infinite becomes infinite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, check_options, is_finite, option_names, out_of_range, unknown_name
from .kl_ball import TokenProjection, check_limit
from .masking import masked_mean

ClipRuleName = Literal[
    "none", "ppo", "dual", "rollback", "spo", "cispo", "sapo", "gspo", "gmpo", "dppo_tv", "dppo_kl", "drpo", "troll"
]


class Surrogate(NamedTuple):
    """objective: [B, T], to be maximised. gated: [B, T] in [0, 1], the removed share of the token's gradient. penalty: [B, T],
    a term over the vocabulary to be subtracted from the objective, which is not estimated at the sampled token; or None."""

    objective: Tensor
    gated: Tensor
    penalty: Tensor | None = None


# -- Shared pieces -----------------------------------------------------------------------------------------------------


def _masked(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the working dtype, 0 under a False mask, where A = 0 makes every objective 0; the advantages are detached."""
    dtype = torch.promote_types(torch.promote_types(log_ratio.dtype, advantages.dtype), torch.float32)
    return torch.where(mask, log_ratio.to(dtype), 0.0), torch.where(mask, advantages.detach().to(dtype), 0.0)


def _old(old_logp: Tensor | None, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """log π_old in the working dtype, 0 under a False mask; ConfigError without it."""
    if old_logp is None:
        raise ConfigError("`old_logp` got None; this clip rule needs log π_old of the sampled tokens, [B, T].")
    return torch.where(mask, old_logp.detach().to(log_ratio.dtype), 0.0)


def _live(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """log_ratio, and 0 where A = 0, so that 0 · inf cannot occur."""
    return torch.where(advantages == 0, 0.0, log_ratio)


def _weighted(log_weight: Tensor, advantages: Tensor) -> Tensor:
    """exp(log_weight)·A."""
    return _live(log_weight, advantages).exp() * advantages


def _log_range(low: float, high: float) -> tuple[float, float]:
    """log(1 − low) and log(1 + high); ConfigError outside 0 ≤ low ≤ 1 and 0 ≤ high."""
    _require("cliprange", low, 0 <= low <= 1, "from 0 to 1: the lower end of the range is 1 - cliprange")
    _require("cliprange_high", high, high >= 0, "0 or above: the upper end of the range is 1 + cliprange_high")
    return (math.log1p(-low) if low < 1 else -math.inf), math.log1p(high)


def _overshot(log_weight: Tensor, advantages: Tensor, log_low: float, log_high: float) -> Tensor:
    """True where the weight has left the range in the direction in which the advantage pushes it."""
    return ((advantages > 0) & (log_weight > log_high)) | ((advantages < 0) & (log_weight < log_low))


def _clip(log_weight: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """log_weight clamped to the range where it has overshot it, and the mask of these tokens."""
    log_low, log_high = _log_range(low, high)
    outside = _overshot(log_weight, advantages, log_low, log_high)
    return torch.where(outside, _by_sign(advantages, log_high, log_low), log_weight), outside


def _by_sign(advantages: Tensor, positive: float, other: float) -> Tensor:
    """`positive` where A > 0 and `other` elsewhere, in the dtype of the advantages."""
    # `torch.where` of two Python numbers would give float32.
    return torch.where(advantages > 0, torch.full_like(advantages, positive), other)


def _require(field: str, value: float, holds: bool, valid: str, fix: str = "") -> None:
    if not holds or not math.isfinite(value):
        raise out_of_range(field, value, valid, fix)


def _positive(name: str, value: float) -> None:
    _require(f"clip_kwargs['{name}']", value, value > 0, "a finite number above 0")


# -- Token rules -------------------------------------------------------------------------------------------------------


def none(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """w·A, the surrogate of conservative policy iteration (arXiv 1707.06347, eq. 6); no range. gated = 0."""
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    return Surrogate(_weighted(log_ratio, advantages), torch.zeros_like(advantages))


def ppo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
        old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """min(w·A, clip(w, 1 − low, 1 + high)·A) (PPO, arXiv 1707.06347, eq. 7; two-sided range: arXiv 2503.14476).

    The min differs from w·A only on the side to which the advantage pushes, so this is a one-sided clamp of log w. gated:
    1 where it clamps.

    >>> ratios, advantages = torch.tensor([1.5, 1.5, 1.1]), torch.tensor([1.0, -1.0, 1.0])
    >>> ppo(ratios.log(), advantages, torch.tensor([True, True, True]), low=0.2, high=0.2)
    Surrogate(objective=tensor([ 1.2000, -1.5000,  1.1000]), gated=tensor([1., 0., 0.]), penalty=None)
    """
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    clipped, outside = _clip(log_ratio, advantages, low, high)
    return Surrogate(_weighted(clipped, advantages), outside.to(advantages.dtype))


def dual(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None, c: float = 3.0) -> Surrogate:  # fmt: skip
    """PPO, but for A < 0 no less than c·A: max(min(w·A, clip(w)·A), c·A) (dual clip, arXiv 1912.09729, c = 3 there).

    With PPO the gradient of a token with A < 0 grows without limit with w; here it is 0 beyond w = c. `c` must be above 1.
    """
    _require("clip_kwargs['c']", c, c > 1, "a finite number above 1")
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    clipped, outside = _clip(log_ratio, advantages, low, high)
    runaway = (advantages < 0) & (log_ratio > math.log(c))
    clipped = torch.where(runaway, math.log(c), clipped)
    return Surrogate(_weighted(clipped, advantages), (outside | runaway).to(advantages.dtype))


def rollback(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
             old_logp: Tensor | None = None, alpha: float = 0.3) -> Surrogate:  # fmt: skip
    """min(w·A, F(w)·A), F(w) = −α·w + (1 + α)(1 ± range) outside the range and w inside (PPO-RB, arXiv 1903.07940).

    Where PPO's gradient is 0, this one points back with slope −α; gated is 1 there, as nothing of the original gradient
    is left. `alpha` must be above 0 (0 would be PPO). The paper uses 0.3 on most tasks, 0.02 on Humanoid.
    """
    _positive("alpha", alpha)
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    _, outside = _clip(log_ratio, advantages, low, high)
    slope = torch.where(outside, torch.full_like(advantages, -alpha), 1.0)
    offset = torch.where(outside, (1 + alpha) * _by_sign(advantages, 1 + high, 1 - low), 0.0)
    return Surrogate((slope * _live(log_ratio, advantages).exp() + offset) * advantages, outside.to(advantages.dtype))


def spo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
        old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """w·A − |A|(w − 1)²/(2ε) (SPO, arXiv 2401.16025): a penalty whose optimum for a single token is w = 1 ± ε.

    ε is `high` for A > 0 and `low` for A < 0, so that the optimum is the end of the range; both must be above 0.
    gated = clamp(sign(A)·(w − 1)/ε, 0, 1): the share of the gradient that the penalty cancels.
    """
    _require("cliprange", low, 0 < low <= 1, "above 0 and at most 1 with clip_rule='spo', which divides by it")
    _require("cliprange_high", high, high > 0, "above 0 with clip_rule='spo', which divides by it")
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    sign, epsilon = advantages.sign(), _by_sign(advantages, high, low)
    moved = torch.expm1(_live(log_ratio, advantages))  # w − 1
    # sign·w − (w − 1)²/(2ε), factored: the difference of the two would be inf − inf.
    objective = advantages.abs() * (sign + moved * (sign - moved / (2 * epsilon)))
    return Surrogate(objective, (sign * moved.detach() / epsilon).clamp(0.0, 1.0))


def cispo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
          old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """sg(clip(w, 1 − low, 1 + high))·A·log π (CISPO, arXiv 2506.13585): the weight is capped, no token is dropped.

    Without `old_logp` the objective has log w in place of log π, which differ by a constant: the gradient is the same. The
    paper has no lower end (low = 1). gated = clamp(1 − clip(w)/w, 0, 1), above the range only.
    """
    log_low, log_high = _log_range(low, high)
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    clipped = log_ratio.detach().clamp(log_low, log_high)
    gated = -torch.expm1((clipped - log_ratio.detach()).clamp(max=0.0))
    logp = log_ratio if old_logp is None else log_ratio + torch.where(mask, old_logp.detach().to(log_ratio.dtype), 0.0)
    return Surrogate(clipped.exp() * advantages * logp, torch.where(advantages == 0, 0.0, gated))


def sapo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Surrogate:  # fmt: skip
    """(4/τ)·σ(τ(w − 1))·A, τ = `tau_pos` for A > 0 and `tau_neg` otherwise (SAPO, arXiv 2511.20347): no range.

    The gradient is w·A times 4σ(1 − σ) = sech²(τ(w − 1)/2), hence gated = tanh²(τ(w − 1)/2). Both τ must be above 0;
    the defaults are the paper's.
    """
    _positive("tau_pos", tau_pos)
    _positive("tau_neg", tau_neg)
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    tau = _by_sign(advantages, tau_pos, tau_neg)
    # The sigmoid is flat long before e^30; where e^x overflows its gradient would be 0 · inf.
    x = tau * torch.expm1(_live(log_ratio, advantages).clamp(max=30.0))
    return Surrogate(torch.sigmoid(x) * (4 / tau) * advantages, (x.detach() / 2).tanh().square())


# -- Sequence rules ----------------------------------------------------------------------------------------------------


def gspo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """min(s·A, clip(s, 1 − low, 1 + high)·A), s_t = sg(s)·w_t/sg(w_t), s = (Πw)^(1/T) (GSPO-token, arXiv 2507.18071).

    The value is that of the sequence, and each token has the gradient s·A·∇log π_t: the mean over the tokens of a response
    is the paper's s·A·∇log s, its length normalisation 1/T included. gated: 1 on every token of a response whose s is
    outside the range on the side to which the token's advantage pushes. The paper's ranges are narrow (3e-4, 4e-4).
    """
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    sequence = masked_mean(log_ratio.detach(), mask, dim=1).unsqueeze(1).expand_as(log_ratio)
    clipped, outside = _clip(sequence, advantages, low, high)
    weight = torch.where(outside, clipped, sequence + (log_ratio - log_ratio.detach()))
    return Surrogate(_weighted(weight, advantages), outside.to(advantages.dtype))


def gmpo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None) -> Surrogate:  # fmt: skip
    """sg(G)·A·v_t/sg(v_t): v_t is w_t clipped as PPO does, G = (Πv)^(1/T) (GMPO, arXiv 2507.20673, token form).

    The value is the geometric mean of the sequence, and each token has the gradient G·A·∇log π_t inside the range and 0
    outside: the mean over the tokens of a response is the paper's gradient of G·A, its 1/T included. The paper clips log w
    to ±0.4, which is low = 0.33, high = 0.49. gated: 1 on the clipped tokens.
    """
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    clipped, outside = _clip(log_ratio, advantages, low, high)
    sequence = masked_mean(clipped.detach(), mask, dim=1).unsqueeze(1)
    return Surrogate(_weighted(sequence + (clipped - clipped.detach()), advantages), outside.to(advantages.dtype))


# -- Divergence masks --------------------------------------------------------------------------------------------------


def _binary_tv(old_logp: Tensor, logp: Tensor) -> Tensor:
    return (logp.exp() - old_logp.exp()).abs()


def _binary_kl(old_logp: Tensor, logp: Tensor) -> Tensor:
    rest, new_rest = -torch.expm1(old_logp), -torch.expm1(logp)
    others = torch.where(rest > 0, rest * (rest.log() - new_rest.log()), 0.0)
    return old_logp.exp() * (old_logp - logp) + others


def _divergence_mask(divergence: Callable[[Tensor, Tensor], Tensor], log_ratio: Tensor, advantages: Tensor,
                     mask: Tensor, old_logp: Tensor | None, delta: float) -> Surrogate:  # fmt: skip
    """w·A, and 0 for tokens that move away (A > 0, w > 1 or A < 0, w < 1) with a divergence above `delta`."""
    _positive("delta", delta)
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    old = _old(old_logp, log_ratio, mask).clamp(max=0.0)
    # Rounding can put old + log_ratio above 0; a probability above 1 has no divergence.
    beyond = divergence(old, (old + log_ratio.detach()).clamp(max=0.0)) > delta
    dropped = beyond & _overshot(log_ratio, advantages, 0.0, 0.0)
    kept = torch.where(dropped, 0.0, advantages)
    return Surrogate(_weighted(log_ratio, kept), dropped.to(advantages.dtype))


def dppo_tv(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
            old_logp: Tensor | None = None, delta: float = 0.15) -> Surrogate:  # fmt: skip
    """M·w·A, M = 0 where the token moves away and |p − μ| > δ (DPPO, arXiv 2602.04879); the range is ignored.

    p = π(token), μ = π_old(token); |p − μ| is the total variation over the outcomes "this token" and "any other".
    ConfigError without `old_logp`, from which p and μ are computed. gated = 1 − M.
    """
    return _divergence_mask(_binary_tv, log_ratio, advantages, mask, old_logp, delta)


def dppo_kl(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
            old_logp: Tensor | None = None, delta: float = 0.05) -> Surrogate:  # fmt: skip
    """`dppo_tv` with the binary KL, μ log(μ/p) + (1 − μ) log((1 − μ)/(1 − p)) > δ in nats (DPPO, arXiv 2602.04879)."""
    return _divergence_mask(_binary_kl, log_ratio, advantages, mask, old_logp, delta)


def drpo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
         old_logp: Tensor | None = None, delta: float = 0.15) -> Surrogate:  # fmt: skip
    """w·A − |A|·μ(w − 1)²/(2δ) (DRPO, arXiv 2606.09821, eq. 8): SPO's penalty with the range |p − μ| ≤ δ of `dppo_tv`.

    Its gradient is w·A times 1 − sign(A)(p − μ)/δ: 0 at p = μ ± δ, and beyond it points back. The range is ignored. gated =
    clamp(sign(A)(p − μ)/δ, 0, 1). The default is that of `dppo_tv`; the paper's experiments have δ = 12.5, with which the
    weight stays within 8 % of 1. A ratio above e^80 counts as e^80. ConfigError without `old_logp`.
    """
    _positive("delta", delta)
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    old = _old(old_logp, log_ratio, mask)
    log_ratio = _live(log_ratio, advantages).clamp(max=80.0)
    sign, moved = advantages.sign(), torch.expm1(log_ratio)  # w − 1
    # Rounding can put old + log_ratio slightly above 0, where the gradient must not be cut off; the clamp is far from there.
    shift = (old + log_ratio).clamp(max=1.0).exp() - old.exp()  # p − μ = μ(w − 1)
    objective = advantages.abs() * (sign + moved * (sign - shift / (2 * delta)))
    return Surrogate(objective, (sign * shift.detach() / delta).clamp(0.0, 1.0))


# -- Projections -------------------------------------------------------------------------------------------------------


def troll(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float,
          old_logp: Tensor | None = None, projection: TokenProjection | None = None,
          limit: float = 0.05, alpha: float = 1.0) -> Surrogate:  # fmt: skip
    """w̃·A − α·KL(π‖π̃), w̃ = π̃/π_old at the token: π̃ is the distribution nearest to π with KL(π̃‖π_old) ≤ `limit`, in nats.

    TROLL (arXiv 2510.03817), here over the complete vocabulary; `kl_ball` computes π̃. In the second term π̃ is constant, so
    that π follows its projection; it is the `penalty` of the result. A token within the limit has the gradient w·A, and the
    range is ignored. gated = clamp(1 − (w̃·A·kept − α·pull)/(w·A), 0, 1), of the terms of `TokenProjection`. ConfigError
    without `old_logp` or `projection`.
    """
    check_limit("clip_kwargs['limit']", limit)
    _require("clip_kwargs['alpha']", alpha, alpha >= 0, "a finite number >= 0", "0 leaves out KL(π‖π̃).")
    if projection is None:
        raise ConfigError("`projection` got None; clip_rule='troll' needs the projections of the tokens, [B, T] each.")
    log_ratio, advantages = _masked(log_ratio, advantages, mask)
    old = _old(old_logp, log_ratio, mask)
    logp, kl, kept, pull = (torch.where(mask, each.to(log_ratio.dtype), 0.0) for each in projection)
    projected = _live(torch.where(mask, logp - old, 0.0), advantages)
    log_w, projected_log_w = (
        each.detach().clamp(-40.0, 40.0) for each in (log_ratio, projected)
    )  # so that none is NaN
    left = (projected_log_w - log_w).exp() * kept.detach()
    back = alpha * pull.detach() * (-log_w).exp() / advantages
    gated = torch.where(advantages == 0, 0.0, (1 - left + back).clamp(0.0, 1.0))
    return Surrogate(projected.exp() * advantages, gated, alpha * kl)


# -- By name -----------------------------------------------------------------------------------------------------------

Rule = Callable[..., Surrogate]

SURROGATES: dict[ClipRuleName, Rule] = {
    "none": none, "ppo": ppo, "dual": dual, "rollback": rollback, "spo": spo, "cispo": cispo, "sapo": sapo,
    "gspo": gspo, "gmpo": gmpo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl, "drpo": drpo, "troll": troll,
}  # fmt: skip

WITHOUT_RANGE: frozenset[str] = frozenset({"none", "sapo", "dppo_tv", "dppo_kl", "drpo", "troll"})
"""The rules that ignore `low` and `high`."""

SEQUENCE_RANGE: frozenset[str] = frozenset({"gspo"})
"""The rules whose range applies to the geometric mean of a response's ratios, not to the ratio of a token."""


class ClipRule(NamedTuple):
    """A rule with its range and options bound: (log_ratio, advantages, mask, old_logp=None, projection=None) -> Surrogate.

    limit: where the rule needs the `projection` of the tokens' distributions, that of KL(π̃‖π_old), in nats; otherwise None.
    """

    rule: Rule
    options: dict[str, float]
    limit: float | None

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, old_logp: Tensor | None = None,
                 projection: TokenProjection | None = None) -> Surrogate:  # fmt: skip
        given = {} if self.limit is None else {"projection": projection}
        return self.rule(log_ratio, advantages, mask, old_logp=old_logp, **given, **self.options)


def build_surrogate(name: str, low: float, high: float, kwargs: Mapping[str, float] | None = None) -> ClipRule:
    """The rule `name` with its range and options bound.

    ConfigError for an unknown rule or option (`clip_kwargs`), and for a range or an option's value that the rule rejects.
    """
    if name not in SURROGATES:
        raise unknown_name("clip_rule", name, SURROGATES)
    rule, kwargs = SURROGATES[name], dict(kwargs or {})
    arguments = option_names(rule)
    options = [option for option in arguments if option not in ("low", "high", "old_logp", "projection")]
    check_options("clip_kwargs", name, options, kwargs)
    for option, value in kwargs.items():
        if not is_finite(value):
            raise out_of_range(f"clip_kwargs['{option}']", value, "a finite number")
    limit = (
        kwargs.get("limit", inspect.signature(rule).parameters["limit"].default) if "projection" in arguments else None
    )
    bound = ClipRule(rule, {"low": low, "high": high, **kwargs}, limit)
    token = torch.zeros(1, 1)
    # So that a bad value is reported here and not after the first rollout.
    bound(token, token, token == 0, token, TokenProjection(token, token, token, token))
    return bound
