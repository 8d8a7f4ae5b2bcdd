"""From hidden states and an output head to token log-probabilities, entropy and exact divergences, in chunks.

A language model's logits are the largest tensor of a fine-tune: [B, T, V] in float32 is gigabytes at a vocabulary of
150,000. Nothing here holds them: the head runs on a chunk of tokens at a time, and when gradients are wanted the chunk is
run again in the backward pass instead of being kept, with the elementwise work on it block by block. The extra memory is a
few buffers of `CHUNK_ELEMENTS`, whatever B and T are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import divergences
from ..types import Head, PolicySnapshot

CHUNK_ELEMENTS = 2**22
"""Logits in one chunk: 16 MiB in float32, small enough for a CPU's cache hierarchy and large enough for a GPU."""

CACHE_ELEMENTS = 2**19
"""Logits in one block of elementwise work on a CPU: 2 MiB in float32, so that a few of them fit into its cache."""


class TokenStatistics(NamedTuple):
    """Per token, [N] each: see `token_statistics`. None where it was not asked for."""

    logp: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_kl: Tensor | None = None
    old_kl: Tensor | None = None
    old_tv: Tensor | None = None


_CONSTANT = ("ref_logp", "old_tv")
"""Statistics without a gradient: one of the reference alone, and one that is a measurement only."""


def token_statistics(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = False,
    ref: PolicySnapshot | None = None,
    old: PolicySnapshot | None = None,
) -> TokenStatistics:
    """Log-probabilities of `targets` [N] from `hidden` [N, H], with what can be had from the same logits.

    Every distribution is softmax(logits / temperature). entropy: in nats. With `ref`: log π_ref(target) and the exact
    KL(π‖π_ref). With `old`: the exact KL(π_old‖π) and total variation. Gradients
    flow to `hidden` and to `head.parameters()`, where it has them, never to a snapshot. Chunk boundaries depend on N and V
    only, so that two passes over the same tokens do the same arithmetic.
    """
    plan = _Plan(head, vocab_size, temperature, entropy, ref, old)
    trained = [p for p in getattr(head, "parameters", tuple)() if p.requires_grad]
    columns = _Chunked.apply(hidden, targets, plan, *trained)  # type: ignore[no-untyped-call]
    return TokenStatistics(**dict(zip(plan.names, columns, strict=True)))


class _Plan(NamedTuple):
    """The arguments of `token_statistics` that have no gradient."""

    head: Head
    vocab_size: int
    temperature: float
    entropy: bool
    ref: PolicySnapshot | None
    old: PolicySnapshot | None

    @property
    def names(self) -> list[str]:
        """The columns of `TokenStatistics` that are asked for, in the order of `_block`."""
        asked = (True, self.entropy, *[self.ref is not None] * 2, *[self.old is not None] * 2)
        return [name for name, wanted in zip(TokenStatistics._fields, asked, strict=True) if wanted]

    def at(self, rows: slice) -> _Plan:
        """The same for some of the tokens."""
        ref, old = (
            None if snapshot is None else PolicySnapshot(snapshot.hidden[rows], snapshot.head)
            for snapshot in (self.ref, self.old)
        )
        return self._replace(ref=ref, old=old)

    def snapshot_logits(self) -> list[Tensor | None]:
        """The reference's and the old policy's logits."""
        snapshots = (self.ref, self.old)
        return [
            None if snapshot is None else _tempered(snapshot.head, snapshot.hidden, self.temperature)
            for snapshot in snapshots
        ]


class _Chunked(torch.autograd.Function):
    """The columns, [N] each. Nothing of a chunk outlives it in either direction, not even a node of the graph: small pieces
    that stay between large ones keep the allocator from using the room again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, plan: _Plan, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.trained, ctx.autocast = plan, trained, _autocast_now(hidden)
        ctx.save_for_backward(hidden, targets)
        ctx.set_materialize_grads(False)
        columns: list[Tensor] = []
        for chunk in _slices(hidden, _chunk_rows(plan)):
            found = _chunk_columns(hidden[chunk], targets[chunk], plan.at(chunk))
            columns = columns or [each.new_empty(len(hidden)) for each in found]
            for column, each in zip(columns, found, strict=True):
                column[chunk] = each
        ctx.mark_non_differentiable(*(c for name, c in zip(plan.names, columns, strict=True) if name in _CONSTANT))
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wanted: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(each is None for each in wanted):  # what comes after cut the gradient off
            return (None,) * (3 + len(ctx.trained))
        hidden, targets = ctx.saved_tensors
        # In float32 at least: a sum of many chunks in half precision would lose the small ones.
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in ctx.trained]
        of_hidden = torch.empty_like(hidden)
        of_trained = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(ctx.trained, dtypes, strict=True)]
        for chunk in _slices(hidden, _chunk_rows(ctx.plan)):
            part = hidden[chunk].detach().requires_grad_()
            plan, asked = ctx.plan.at(chunk), _at(wanted, chunk)
            with ctx.autocast():
                logits, gradient = _chunk_gradient(part, targets[chunk], asked, plan)
            of_hidden[chunk], *others = torch.autograd.grad(
                logits, [part, *ctx.trained], gradient, allow_unused=True, materialize_grads=True
            )
            del logits, gradient  # before the next chunk has its own
            for total, each in zip(of_trained, others, strict=True):
                total += each
        return of_hidden, None, None, *(each.to(p.dtype) for p, each in zip(ctx.trained, of_trained, strict=True))


def _chunk_columns(hidden: Tensor, target: Tensor, plan: _Plan) -> list[Tensor]:
    """The columns of a chunk."""
    logits, snapshots = _tempered(plan.head, hidden, plan.temperature), plan.snapshot_logits()
    blocks = [
        _block(logits[rows], target[rows], _at(snapshots, rows), plan)
        for rows in _slices(hidden, _block_rows(hidden, plan))
    ]
    return [torch.cat(column) for column in zip(*blocks, strict=True)]


def _chunk_gradient(
    hidden: Tensor, target: Tensor, wanted: Sequence[Tensor | None], plan: _Plan
) -> tuple[Tensor, Tensor]:
    """A chunk's logits, and the gradient of Σ wanted·column at them, with one block's intermediate results at a time."""
    with torch.enable_grad():
        logits = _tempered(plan.head, hidden, plan.temperature)
    snapshots, gradient = plan.snapshot_logits(), torch.empty_like(logits)
    for rows in _slices(logits, _block_rows(logits, plan)):
        with torch.enable_grad():
            part = logits[rows].detach().requires_grad_()
            columns = _block(part, target[rows], _at(snapshots, rows), plan)
        pairs = [(column, each[rows]) for column, each in zip(columns, wanted, strict=True) if each is not None]
        outputs, weights = zip(*pairs, strict=True)
        gradient[rows] = torch.autograd.grad(outputs, part, weights)[0]
    return logits, gradient


def _slices(rows: Tensor, size: int) -> Iterator[slice]:
    """Of at most `size` rows each; an empty one where there is none."""
    return (slice(start, start + size) for start in range(0, max(1, len(rows)), size))


def _chunk_rows(plan: _Plan) -> int:
    return max(1, CHUNK_ELEMENTS // plan.vocab_size)


def _block_rows(of: Tensor, plan: _Plan) -> int:
    """On a CPU the elementwise work goes block by block, so that what one operation wrote is in the cache for the next."""
    return max(1, CACHE_ELEMENTS // plan.vocab_size) if of.device.type == "cpu" else max(1, len(of))


def _at(tensors: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
    return [None if each is None else each[rows] for each in tensors]


def _block(logits: Tensor, target: Tensor, snapshots: list[Tensor | None], plan: _Plan) -> list[Tensor]:
    """The columns of `TokenStatistics` that were asked for, for some tokens."""
    ref_logits, old_logits = snapshots
    logps = torch.log_softmax(logits, -1)
    out = [_gather(logps, target)]
    if plan.entropy:
        out.append(-torch.where(logps.isneginf(), 0.0, logps.exp() * logps).sum(-1))
    if ref_logits is not None:
        ref_logps = torch.log_softmax(ref_logits, -1)
        out += [_gather(ref_logps, target), divergences.exact_from_logps("kl", logps, ref_logps)]
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


def _autocast_now(tensor: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Today's autocast, for a backward pass later. Without its cache, which would hand one chunk's freed graph to the next."""
    device = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _gather(logps: Tensor, target: Tensor) -> Tensor:
    return logps.gather(-1, target.unsqueeze(-1)).squeeze(-1)
