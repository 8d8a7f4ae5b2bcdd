"""Micro-batches: some rows of a rollout, trimmed to their longest prompt and response."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import MicroBatch, Rollout, indices


def micro_batches(rollout: Rollout, size: int, order: Tensor | None = None) -> list[MicroBatch]:
    """The rows of a rollout in this order, `size` at a time; by default the longest first.

    Sizes and indices are found on the host, from one read of the masks: reading them for each micro-batch would make the
    host wait for a GPU each time.
    """
    masks = torch.cat([rollout.prompt_mask, rollout.response_mask], dim=1).cpu()
    prompts, responses = masks.split([rollout.prompt_mask.shape[1], rollout.response_mask.shape[1]], dim=1)
    if order is None:
        order = longest_first(rollout._replace(prompt_mask=prompts, response_mask=responses))
    sizes, found = [], []
    for rows in order.cpu().split(size):
        start = int(prompts[rows].any(0).long().argmax())
        length = max(int(responses[rows].sum(-1).max()), 1)
        sizes.append((start, length))
        found += [rows, indices(responses[rows, :length])]
    # Moved together, for the same reason.
    moved = torch.cat(found).to(rollout.response_ids.device).split([len(each) for each in found])
    return [_trimmed(rollout, *each) for each in zip(moved[::2], moved[1::2], sizes, strict=True)]


def micro_batch(rollout: Rollout, rows: Tensor) -> MicroBatch:
    """Some rows of a rollout, trimmed to their longest prompt and their longest response (at least one token)."""
    return micro_batches(rollout, len(rows), rows)[0]


def predicting(states: Tensor, micro: MicroBatch) -> Tensor:
    """The states [N, ·] that predict the response tokens, from those of all positions, or of the last t + 1."""
    length = micro.response_ids.shape[1]
    return states[:, -length - 1 : -1].flatten(0, 1).index_select(0, micro.tokens)


def _trimmed(rollout: Rollout, rows: Tensor, tokens: Tensor, sizes: tuple[int, int]) -> MicroBatch:
    start, length = sizes
    response_ids, response_mask = rollout.response_ids[rows, :length], rollout.response_mask[rows, :length]
    mask = torch.cat([rollout.prompt_mask[rows, start:], response_mask], dim=1)
    return MicroBatch(
        rows=rows,
        # Masked tokens are never attended to. They become token 0, since the padding token may not be in the vocabulary.
        input_ids=torch.cat([rollout.prompt_ids[rows, start:], response_ids], dim=1) * mask,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        response_ids=response_ids,
        response_mask=response_mask,
        token_indices=tokens,
    )


def longest_first(rollout: Rollout) -> Tensor:
    """The rows of a rollout by decreasing length of prompt and response, so that lack of memory shows in the first pass."""
    length = rollout.prompt_mask.sum(-1) + rollout.response_mask.sum(-1)
    return length.argsort(descending=True, stable=True)


def positions(mask: Tensor) -> Tensor:
    """Position ids [b, n] that count the tokens under the mask from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
