"""Micro-batches: some rows of a rollout, trimmed to their longest prompt and response."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import MicroBatch, Rollout


def trim_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are padding in every row; one column stays."""
    start = min(int(mask.any(0).long().argmax()), mask.shape[1] - 1)
    return ids[:, start:], mask[:, start:]


def micro_batch(rollout: Rollout, rows: Tensor) -> MicroBatch:
    """Some rows of a rollout, trimmed to their longest prompt and their longest response (at least one token)."""
    prompt_ids, prompt_mask = trim_left(rollout.prompt_ids[rows], rollout.prompt_mask[rows])
    length = max(int(rollout.response_mask[rows].sum(-1).max()), 1)
    response_ids = rollout.response_ids[rows, :length]
    response_mask = rollout.response_mask[rows, :length]
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    return MicroBatch(
        rows=rows,
        # What is masked is never attended to; token 0 exists in every vocabulary, the padding token may not.
        input_ids=torch.cat([prompt_ids, response_ids], dim=1) * mask,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        response_ids=response_ids,
        response_mask=response_mask,
    )


def longest_first(rollout: Rollout) -> Tensor:
    """The rows of a rollout by length, prompt and response together: what does not fit into memory fails at once."""
    length = rollout.prompt_mask.sum(-1) + rollout.response_mask.sum(-1)
    return length.argsort(descending=True, stable=True)


def positions(mask: Tensor) -> Tensor:
    """Position ids [b, n] that count the tokens under the mask from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
