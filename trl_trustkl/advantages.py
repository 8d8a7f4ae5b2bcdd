"""Shaped rewards, advantages by a value (GAE) or by the other responses to a prompt, and the anchor's part of an advantage.

Shapes: B sequences, T response positions, G groups of N responses to one prompt; every mask is True where a position counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .masking import masked_mean, masked_moments, masked_sum

ScorePosition = Literal["after_eos", "eos"]
AdvantageEstimator = Literal["gae", "grpo", "rloo"]
RewardScale = Literal["group", "batch", "none"]

STD_OFFSET = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


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


# -- without a value: the baseline of a response is made of the other responses to its prompt ------------------------------


def less_group_mean(rewards: Tensor, known: Tensor) -> Tensor:
    """r_i − mean(r_1 … r_N), [G, N], over the responses of the group that have a reward (GRPO, arXiv 2402.03300)."""
    return rewards - masked_mean(rewards, known, dim=1).unsqueeze(1)


def less_mean_of_others(rewards: Tensor, known: Tensor) -> Tensor:
    """r_i − mean_{j≠i} r_j, [G, N], over the responses of the group that have a reward (RLOO, arXiv 2402.14740)."""
    others = (known.sum(1) - 1).clamp(min=1).unsqueeze(1)
    return rewards - (masked_sum(rewards, known, dim=1).unsqueeze(1) - rewards) / others


BASELINES: dict[AdvantageEstimator, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": less_group_mean,
    "rloo": less_mean_of_others,
}
"""The estimators without a value: (rewards, known) -> [G, N], linear in the rewards; these are 0 where they are not known."""


class GroupAdvantages(NamedTuple):
    """Of the responses of a batch, [B] each. factor: what `scale` multiplied the advantages by. compared: whether another
    response to the prompt has a reward too. signal: whether these rewards differ; without that the advantage is 0."""

    advantages: Tensor
    factor: Tensor
    compared: Tensor
    signal: Tensor


def group_advantages(
    rewards: Tensor, known: Tensor, *, size: int, estimator: AdvantageEstimator, scale: RewardScale = "none"
) -> GroupAdvantages:
    """Advantages [B] of the responses to prompts that have `size` responses each, which follow each other.

    known: [B], whether a response has a reward; one without is in no mean, and its advantage is 0. scale: divides by the
    standard deviation (Bessel-corrected, plus 1e-4, as in TRL) of the rewards of the group or of the batch.

    >>> rewards, known = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([True, True, True, True])
    >>> group_advantages(rewards, known, size=2, estimator="grpo").advantages
    tensor([-1.,  1.,  0.,  0.])
    >>> group_advantages(rewards, known, size=2, estimator="rloo").advantages
    tensor([-2.,  2.,  0.,  0.])
    """
    counts = known.view(-1, size)
    groups = torch.where(counts, rewards.view(-1, size), 0.0)
    lowest, highest = groups.masked_fill(~counts, torch.inf).amin(1), groups.masked_fill(~counts, -torch.inf).amax(1)
    signal = counts & (lowest != highest).unsqueeze(1)
    compared = counts & (counts.sum(1, keepdim=True) > 1)
    factor = torch.ones_like(groups)
    if scale == "batch":
        factor = factor / (masked_moments(rewards, known)[1].sqrt() + STD_OFFSET)
    elif scale == "group":
        squares = masked_sum(less_group_mean(groups, counts) ** 2, counts, dim=1)
        factor = factor / ((squares / (counts.sum(1) - 1).clamp(min=1)).sqrt() + STD_OFFSET).unsqueeze(1)
    advantages = torch.where(signal, BASELINES[estimator](groups, counts) * factor, 0.0)
    return GroupAdvantages(*(each.flatten() for each in (advantages, factor, compared, signal)))


def group_part(
    part: Tensor, known: Tensor, found: GroupAdvantages, *, size: int, estimator: AdvantageEstimator
) -> Tensor:
    """A_anchor [B]: what `part` of the rewards, the anchor's, is of the advantages that were `found` from all of them."""
    counts = known.view(-1, size)
    groups = torch.where(counts, part.view(-1, size), 0.0)
    return torch.where(found.signal, BASELINES[estimator](groups, counts).flatten() * found.factor, 0.0)


# -- what is derived from advantages ------------------------------------------------------------------------------------


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
