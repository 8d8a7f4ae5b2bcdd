"""The projection of tokens' distributions onto the ball of KL(·‖π_old) ≤ limit, for rows of `token_statistics`.

Only the rows outside of the ball are computed. A GPU's host waits for their number in each chunk, and for the search.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import divergences
from ..kl_ball import BallProjection, outside_ball, project, tilted

PIECE = 2**22
"""Logits projected at a time, since the search keeps some ten buffers of this size."""

COLUMNS = ("projected_logp", "projected_kl", "projected_kept", "projected_pull", "projected_scale")
"""The columns of `statistics`, [n] each: the fields of `TokenProjection`, and the scale s."""


def statistics(logps: Tensor, old_logps: Tensor, targets: Tensor, limit: float) -> dict[str, Tensor]:
    """`COLUMNS` of some rows: logps, old_logps [n, V] and targets [n, 1]."""
    logp = logps.gather(-1, targets).squeeze(-1)
    zeros, ones = torch.zeros_like(logp), torch.ones_like(logp)
    columns = dict(zip(COLUMNS, (logp, zeros, ones, zeros.clone(), ones.clone()), strict=True))
    for rows in _pieces(outside_ball(logps, old_logps, limit), logps):
        of_rows, target = logps[rows], targets[rows]
        found = project(of_rows, old_logps[rows], limit)
        p = of_rows.exp()
        kl = divergences.kl_between(of_rows, found.logps, p, found.logps.exp())
        kept = _along(_of_target(found, target), of_rows, p, target)
        pull = _along(_of_kl(of_rows, p, found.logps, kl), of_rows, p, target)
        columns["projected_logp"][rows] = found.logps.gather(-1, target).squeeze(-1)
        columns["projected_kl"][rows] = kl
        columns["projected_kept"][rows] = torch.where(kept.isfinite(), kept, 1.0).squeeze(-1)
        columns["projected_pull"][rows] = torch.where(pull.isfinite(), pull, 0.0).squeeze(-1)
        columns["projected_scale"][rows] = found.scale.squeeze(-1)
    return columns


def add_gradient(
    gradient: Tensor,
    logps: Tensor,
    p: Tensor,
    old_logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    weights: dict[str, Tensor],
) -> None:
    """Add the gradient of Σ weight·projected_logp + Σ weight·projected_kl with respect to the logits to `gradient` [n, V].

    logps, p: of π, [n, V]. targets: [n, 1]. scale: [n], as `statistics` found it, on the CPU. weights: [n, 1], by the columns'
    names.
    """
    of_logp, of_kl = (weights.get(name) for name in ("projected_logp", "projected_kl"))
    outside, scale = (scale < 1).nonzero().squeeze(1).to(logps.device), scale.to(logps).unsqueeze(-1)
    if of_logp is not None:  # of the rows inside, as log π(target)
        inside = torch.where(scale < 1, 0.0, of_logp)
        gradient.addcmul_(p, inside, value=-1).scatter_add_(-1, targets, inside)
    for rows in _pieces(outside, logps):
        of_rows = logps[rows]
        found = tilted(of_rows, torch.log_softmax(old_logits[rows], -1), scale[rows])
        if of_logp is not None:
            gradient[rows] += _of_target(found, targets[rows]) * of_logp[rows]
        if of_kl is not None:
            kl = divergences.kl_between(of_rows, found.logps, p[rows], found.logps.exp())
            gradient[rows] += _of_kl(of_rows, p[rows], found.logps, kl) * of_kl[rows]


def _along(gradient: Tensor, logps: Tensor, p: Tensor, target: Tensor) -> Tensor:
    """The component of a gradient with respect to logits along ∇log π(target) = 1_y − p, relative to that, [n, 1].

    The entries of a gradient with respect to logits add up to 0, so that the one at the target follows from the others. These
    are small where π is nearly certain of the target, where 1 − p and 1 − 2p + Σp² would be rounding errors.
    """
    others = p.scatter(-1, target, 0.0)
    rest = -torch.expm1(logps.gather(-1, target))  # 1 − p of the target
    norm = rest.square() + others.square().sum(-1, keepdim=True)
    return -(gradient.scatter(-1, target, 0.0) * (others + rest)).sum(-1, keepdim=True) / norm


def _pieces(rows: Tensor, logps: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(max(1, PIECE // logps.shape[-1])) if len(rows) else ())


def _of_target(found: BallProjection, target: Tensor) -> Tensor:
    """The gradient of log π̃(target)."""
    return found.pull_back(torch.zeros_like(found.logps).scatter_(-1, target, 1.0))


def _of_kl(logps: Tensor, p: Tensor, projected: Tensor, kl: Tensor) -> Tensor:
    """The gradient of KL(π‖π̃) for a fixed π̃: p·(log(p/π̃) − KL)."""
    return p * (divergences.log_ratio(logps, projected) - kl.unsqueeze(-1))
