"""Projection onto a ball of the KL divergence: the distribution nearest to π whose KL to π_old is within a limit.

π̃ = argmin KL(π̃‖π) subject to KL(π̃‖π_old) ≤ limit (TROLL, arXiv 2510.03817). With the multiplier η ≥ 0 of the constraint,
π̃ ∝ exp((log π + η log π_old)/(1 + η)). In terms of d = log(π/π_old) and the scale s = 1/(1 + η) in (0, 1] this is the
exponential family π̃ ∝ π_old·e^(s·d), so that KL(π̃‖π_old) increases with s at the rate s·Var_π̃(d): the projection has s = 1
where π itself is within the limit, and elsewhere the s at which the KL is the limit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import is_finite, out_of_range

MOST_STEPS = 100
"""Steps of the search at most. Newton's method, with bisection in its place where it leaves the bracket, takes 4 to 15."""


class TokenProjection(NamedTuple):
    """The projection at the sampled tokens, [B, T] each.

    logp: log π̃(token). kl: KL(π‖π̃), in nats, the gradient of π̃ stopped. kept: what is left of the gradient of log π(token) in
    that of log π̃(token), its component along it relative to it; 1 where the token is within the limit. pull: the same
    component of the gradient of `kl`. The first two have gradients.
    """

    logp: Tensor
    kl: Tensor
    kept: Tensor
    pull: Tensor


class BallProjection(NamedTuple):
    """Distributions π̃ in the family π_old·e^(s·d): logps [n, V]; scale s, and mean and variance of d under π̃, [n, 1] each;
    d [n, V], 0 where π or π_old is 0."""

    logps: Tensor
    scale: Tensor
    d: Tensor
    mean: Tensor
    variance: Tensor

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient [n, V] of Σ gradient·log π̃ with respect to the log-probabilities or logits of π; π_old is constant.

        By implicit differentiation of KL(π̃‖π_old) = limit: ∂s/∂log π_j = −s·π̃_j(d_j − E d)/Var d.
        """
        centred = self.d - self.mean
        along = (gradient * centred).sum(-1, keepdim=True) / self.variance
        along = torch.where(self.variance > 0, along, 0.0)
        total = gradient.sum(-1, keepdim=True)
        return self.scale * (gradient - self.logps.exp() * (total + along * centred))


def check_limit(field: str, limit: float) -> None:
    """ConfigError unless `limit` is a finite number above 0."""
    if not is_finite(limit) or limit <= 0:
        raise out_of_range(field, limit, "a finite number above 0, in nats")


def project_onto_kl_ball(logp: Tensor, old_logp: Tensor, limit: float) -> Tensor:
    """The normalised log-distributions nearest to π within KL(·‖π_old) ≤ `limit`, in nats: [..., V] from [..., V] each.

    Minimises KL(π̃‖π) (TROLL, arXiv 2510.03817). A distribution within the limit is returned as it is, and its gradient is
    passed on; elsewhere the KL is the limit, up to rounding, and the gradient is by implicit differentiation. `old_logp` is
    data. Where π is 0 for so much of π_old that no such distribution exists, the result is the one with the smallest
    KL(·‖π_old), or π_old if they have no entry in common. Computed in float32 at least. ConfigError for a limit that is not
    above 0.

    >>> p, old = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    >>> project_onto_kl_ball(p.log(), old.log(), limit=0.1).exp()
    tensor([0.7198, 0.2802])
    """
    check_limit("limit", limit)
    dtype = torch.promote_types(torch.promote_types(logp.dtype, old_logp.dtype), torch.float32)
    rows = logp.to(dtype).reshape(-1, logp.shape[-1])
    old = old_logp.detach().to(dtype).expand_as(logp).reshape_as(rows)
    return _Project.apply(rows, old, limit).view_as(logp)  # type: ignore[no-untyped-call, no-any-return]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, old_logps: Tensor, limit: float) -> Tensor:
        outside = outside_ball(logps, old_logps, limit)
        found = project(logps[outside], old_logps[outside], limit)
        ctx.save_for_backward(outside, *found)
        return logps.clone().index_copy_(0, outside, found.logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        outside, *found = ctx.saved_tensors
        pulled = BallProjection(*found).pull_back(gradient[outside])
        return gradient.clone().index_copy_(0, outside, pulled), None, None


def outside_ball(logps: Tensor, old_logps: Tensor, limit: float) -> Tensor:
    """The indices of the rows [n, V] with KL(π‖π_old) above the limit. A GPU's host waits for their number."""
    return (_kl(logps, old_logps, old_logps.exp()).squeeze(-1) > limit).nonzero().squeeze(1)


def project(logps: Tensor, old_logps: Tensor, limit: float) -> BallProjection:
    """The projections of rows [n, V] that are outside of the ball.

    Newton's method for √(2·KL) = √(2·limit), which is nearly linear in s, with bisection where it leaves the bracket. A GPU's
    host waits in each step, to learn whether it was the last. The scale is 0 where π and π_old have no entry in common.
    """
    base, d = _family(logps, old_logps)
    old_p = old_logps.exp()
    aim, eps = (2 * limit) ** 0.5, torch.finfo(base.dtype).eps
    low, high = torch.zeros_like(base[:, :1]), torch.ones_like(base[:, :1])
    scale, done = high, torch.zeros_like(high, dtype=torch.bool)
    found = _tilt(base, d, scale)
    for _ in range(MOST_STEPS if len(base) else 0):
        reached = (2 * _kl(found.logps, base, old_p)).sqrt()
        low, high = torch.where(reached > aim, low, scale), torch.where(reached > aim, scale, high)
        # The derivative of √(2·KL) is s·Var/√(2·KL).
        step = scale - (reached - aim) * reached / (scale * found.variance)
        newton = (step > low) & (step < high)  # not for a NaN
        following = torch.where(newton, step, (low + high) / 2)
        # Newton's method converges quadratically: after a step of √eps the error is about eps.
        close = newton & ((following - scale).abs() <= eps**0.5 * scale) | (high - low <= 4 * eps * scale)
        scale = torch.where(done, scale, following)
        done = done | close
        found = _tilt(base, d, scale)
        if bool(done.all()):
            break
    apart = (d == 0).all(-1, keepdim=True)
    return found._replace(scale=torch.where(apart, 0.0, found.scale.clamp(max=1 - eps)))


def tilted(logps: Tensor, old_logps: Tensor, scale: Tensor) -> BallProjection:
    """The projections of rows [n, V] whose scales [n, 1] are known."""
    return _tilt(*_family(logps, old_logps), scale)


def _family(logps: Tensor, old_logps: Tensor) -> tuple[Tensor, Tensor]:
    """log π_old, without the entries that π excludes unless these are all, and d."""
    both = ~(logps.isneginf() | old_logps.isneginf())
    apart = ~both.any(-1, keepdim=True)
    return torch.where(both | apart, old_logps, -torch.inf), torch.where(both, logps - old_logps, 0.0)


def _tilt(base: Tensor, d: Tensor, scale: Tensor) -> BallProjection:
    """The member of the family with this scale."""
    logps = torch.log_softmax(base + scale * d, -1)
    p = logps.exp()
    mean = (p * d).sum(-1, keepdim=True)
    variance = (p * (d - mean).square()).sum(-1, keepdim=True)
    return BallProjection(logps, scale, d, mean, variance)


def _kl(logps: Tensor, old_logps: Tensor, old_p: Tensor) -> Tensor:
    """KL(π‖π_old), [n, 1]. The terms p·log(p/p_old) + p_old − p are not negative, so that little is lost near equality."""
    p = logps.exp()
    terms = torch.where(p > 0, p * (logps - old_logps), 0.0)
    return terms.add_(old_p).sub_(p).sum(-1, keepdim=True).clamp_(min=0.0)
