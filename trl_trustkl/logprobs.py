"""From hidden states and an output head to token log-probabilities, entropy and exact divergences, in chunks.

A language model's logits are the largest tensor of a fine-tune: [B, T, V] in float32 is gigabytes at a vocabulary of
150,000. Nothing here holds them: the head runs on a chunk of tokens at a time, and when gradients are wanted the chunk is
run again in the backward pass instead of being kept (`torch.utils.checkpoint`). The extra memory is a few buffers of
`CHUNK_ELEMENTS`, whatever B and T are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import divergences
from .types import Head, Peer

CHUNK_ELEMENTS = 2**22
"""Logits in one chunk: 16 MiB in float32, small enough for a CPU's cache hierarchy and large enough for a GPU."""

CACHE_ELEMENTS = 2**19
"""Logits in one block of elementwise work on a CPU: 2 MiB in float32, so that a few of them fit into its cache."""


class TokenStatistics(NamedTuple):
    """Per token, [N] each: see `token_statistics`. None where it was not asked for."""

    logp: Tensor
    entropy: Tensor | None
    ref_logp: Tensor | None
    ref_kl: Tensor | None
    old_kl: Tensor | None
    old_tv: Tensor | None


def token_statistics(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = False,
    ref: Peer | None = None,
    old: Peer | None = None,
    ref_divergence: str = "kl",
) -> TokenStatistics:
    """Log-probabilities of `targets` [N] from `hidden` [N, H], with what can be had from the same logits.

    Every distribution is softmax(logits / temperature). entropy: in nats. With `ref`: log π_ref(target) and the exact
    divergence of π from π_ref, KL(π‖π_ref) by default. With `old`: the exact KL(π_old‖π) and total variation. Gradients
    flow to `hidden` and the head, never to a peer. Chunk boundaries depend on N and V only, so that two passes over the
    same tokens do the same arithmetic.
    """

    def run(part: Tensor, target: Tensor, ref_part: Tensor, old_part: Tensor) -> tuple[Tensor, ...]:
        logits = _tempered(head, part, temperature)
        ref_logits, old_logits = _peer_logits(ref, ref_part, temperature), _peer_logits(old, old_part, temperature)
        # On a CPU the elementwise work goes block by block, so that what one operation wrote is in the cache for the next.
        rows = max(1, CACHE_ELEMENTS // vocab_size) if part.device.type == "cpu" else max(1, len(target))
        whole = (logits, target, ref_logits, old_logits)
        count = math.ceil(max(1, len(target)) / rows)
        split = zip(*([None] * count if each is None else torch.split(each, rows) for each in whole), strict=True)
        blocks = [_block(*parts, entropy=entropy, ref_divergence=ref_divergence) for parts in split]
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True))

    size = max(1, CHUNK_ELEMENTS // vocab_size)
    rows: list[tuple[Tensor, ...]] = []
    for start in range(0, max(len(targets), 1), size):
        piece = slice(start, start + size)
        args = (
            hidden[piece],
            targets[piece],
            hidden[:0] if ref is None else ref.hidden[piece],
            hidden[:0] if old is None else old.hidden[piece],
        )
        keep = torch.is_grad_enabled() and len(targets) > 0
        rows.append(checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False) if keep else run(*args))
    columns = iter([torch.cat(column) for column in zip(*rows, strict=True)])
    return TokenStatistics(
        logp=next(columns),
        entropy=next(columns) if entropy else None,
        ref_logp=next(columns) if ref is not None else None,
        ref_kl=next(columns) if ref is not None else None,
        old_kl=next(columns) if old is not None else None,
        old_tv=next(columns) if old is not None else None,
    )


def _block(
    logits: Tensor,
    target: Tensor,
    ref_logits: Tensor | None,
    old_logits: Tensor | None,
    *,
    entropy: bool,
    ref_divergence: str,
) -> list[Tensor]:
    """The columns of `TokenStatistics` that were asked for, for some tokens."""
    logps = torch.log_softmax(logits, -1)
    out = [_gather(logps, target)]
    if entropy:
        out.append(-torch.where(logps.isneginf(), 0.0, logps.exp() * logps).sum(-1))
    if ref_logits is not None:
        ref_logps = torch.log_softmax(ref_logits, -1)
        out += [_gather(ref_logps, target), divergences.exact_from_logps(ref_divergence, logps, ref_logps)]
    if old_logits is not None:
        old_logps = torch.log_softmax(old_logits, -1)
        out += [divergences.exact_from_logps("kl", old_logps, logps)]
        out += [divergences.exact_from_logps("tv", old_logps, logps.detach())]
    return out


def _tempered(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, at least in float32."""
    logits = head(hidden)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits / temperature if temperature != 1.0 else logits


@torch.no_grad()
def _peer_logits(peer: Peer | None, hidden: Tensor, temperature: float) -> Tensor | None:
    """A peer's logits; no gradient goes there."""
    return None if peer is None else _tempered(peer.head, hidden, temperature)


def _gather(logps: Tensor, target: Tensor) -> Tensor:
    return logps.gather(-1, target.unsqueeze(-1)).squeeze(-1)
