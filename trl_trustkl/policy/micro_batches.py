"""Micro-batches: some rows of a rollout, trimmed to their longest prompt and response."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import MicroBatch, Rollout


def micro_batch(rollout: Rollout, rows: Tensor) -> MicroBatch:
    """Some rows of a rollout, trimmed to their longest prompt and their longest response (at least one token)."""
    prompt_mask = rollout.prompt_mask[rows]
    start = int(prompt_mask.any(0).long().argmax())
    length = max(int(rollout.response_mask[rows].sum(-1).max()), 1)
    response_ids, response_mask = rollout.response_ids[rows, :length], rollout.response_mask[rows, :length]
    mask = torch.cat([prompt_mask[:, start:], response_mask], dim=1)
    return MicroBatch(
        rows=rows,
        # Masked tokens are never attended to. They become token 0, since the padding token may not be in the vocabulary.
        input_ids=torch.cat([rollout.prompt_ids[rows, start:], response_ids], dim=1) * mask,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        response_ids=response_ids,
        response_mask=response_mask,
    )


def longest_first(rollout: Rollout) -> Tensor:
    """The rows of a rollout by decreasing length of prompt and response, so that lack of memory shows in the first pass."""
    length = rollout.prompt_mask.sum(-1) + rollout.response_mask.sum(-1)
    return length.argsort(descending=True, stable=True)


def positions(mask: Tensor) -> Tensor:
    """Position ids [b, n] that count the tokens under the mask from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
