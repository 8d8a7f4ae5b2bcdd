"""Shaped rewards, generalised advantage estimation, and the anchor's part of an advantage.

Shapes: B sequences, T response positions; every mask is True where a position counts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .masking import masked_mean, masked_moments, masked_sum

ScorePosition = Literal["after_eos", "eos"]


def score_index(mask: Tensor, position: ScorePosition) -> Tensor:
    """The position of each response's score, [B]: its last token ("eos"), or one position later ("after_eos").

    TRL (and the lm-human-preferences code it ports) puts it one position after the end of a response that ended early,
    and on the last token of one that did not; the value of that extra position is then trained too.
    """
    last = mask.sum(-1) - 1
    index = last + 1 if position == "after_eos" else last
    return index.clamp(min=0, max=mask.shape[-1] - 1)


def value_positions(mask: Tensor, position: ScorePosition) -> Tensor:
    """The positions [B, T] whose value is trained: the response, and the position of the score."""
    columns = torch.arange(mask.shape[-1], device=mask.device)
    return mask | ((columns == score_index(mask, position).unsqueeze(-1)) & mask.any(-1, keepdim=True))


def place_scores(scores: Tensor, mask: Tensor, position: ScorePosition) -> Tensor:
    """`scores` [B] as rewards [B, T] at their positions, 0 elsewhere; a NaN score (no reward) and an empty row give 0."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    known = torch.where(mask.any(-1) & ~scores.isnan(), scores, torch.zeros_like(scores))
    return rewards.scatter(-1, score_index(mask, position).unsqueeze(-1), known.unsqueeze(-1))


def anchor_rewards(divergence: Tensor, mask: Tensor, coef: float, *, of_contexts: bool) -> Tensor:
    """−coef · divergence as rewards [B, T], 0 where the mask is False.

    A sampled estimate is the cost of the token at which it was taken. An exact divergence (`of_contexts`) is a property of
    the context before a token, so it is the cost of the previous token; that of the first context is dropped, as no token
    led to it. With the present divergence in the loss, this is the full gradient Σ_t [∇KL_t + KL_t ∇log π(y_<t)] (Amini,
    Vieira, Cotterell, arXiv 2504.10637).
    """
    if coef == 0.0:
        return torch.zeros_like(divergence)  # also where the divergence is infinite
    cost = torch.where(mask, divergence, torch.zeros_like(divergence))
    if of_contexts:
        cost = torch.cat([cost[:, 1:], torch.zeros_like(cost[:, :1])], dim=1)
    return -coef * cost


def gae(rewards: Tensor, values: Tensor | None = None, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates [B, T] (Schulman et al., arXiv 1506.02438, eq. 16), with V = 0 after the end.

    A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t. Values and rewards must be 0 where the mask is False. Without
    `values` V is 0 everywhere.
    """
    values = torch.zeros_like(rewards) if values is None else values
    advantage = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(advantage)
    columns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = delta + gamma * lam * advantage
        following = values[:, t]
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1)


def anchor_part(part: Tensor, mask: Tensor, gathered: Tensor, gathered_mask: Tensor) -> Tensor:
    """A_anchor [B, T]: `part`, the GAE of only the anchor's rewards at V = 0, minus its batch mean at each position.

    The mean at a position is what a perfect baseline would subtract. `gathered` and `gathered_mask` are `part` and `mask`
    of all processes. GAE is linear in the rewards, so A − A_anchor is the score's part of an advantage.
    """
    return torch.where(mask, part - masked_mean(gathered, gathered_mask, dim=0), torch.zeros_like(part))


def anchor_share(anchor: Tensor, advantages: Tensor, mask: Tensor) -> float:
    """Σ|A_anchor| / Σ(|A_anchor| + |A − A_anchor|) under the mask; 0 where both are 0."""
    pull = masked_sum(anchor.abs(), mask)
    total = pull + masked_sum((advantages - anchor).abs(), mask)
    return float(pull / total) if total > 0 else 0.0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) under the mask; 0 where the returns do not vary."""
    _, variance = masked_moments(returns, mask)
    _, unexplained = masked_moments(returns - values, mask)
    return float(1.0 - unexplained / variance) if variance > 0 else 0.0
