"""Token log-probabilities, entropy and exact divergences from hidden states and an output head, in chunks.

The logits are the largest tensor of fine-tuning: [B, T, V] in float32 takes gigabytes for a vocabulary of 150,000. Here
the head runs on one chunk of tokens at a time. The backward pass runs each chunk again instead of keeping it, with the
elementwise operations on one block of it at a time. The extra memory is a few buffers of a chunk for any B and T.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import divergences
from ..kl_ball import TokenProjection
from ..types import Head, MicroBatch, PolicySnapshot
from . import projection

CHUNK_ELEMENTS = 2**22
"""Logits in one chunk on a CPU, and the fewest on a GPU: 16 MiB in float32."""

BUFFERS, SHARE = 14, 1 / 16
"""On a GPU: buffers of the size of a chunk in float32 that exist at once, and the share of its memory that all may take."""

CACHE_ELEMENTS = 2**19
"""Logits in one block of elementwise operations on a CPU: 2 MiB in float32, so that a few blocks fit into its cache."""


def chunk_elements(device: torch.device) -> int:
    """Logits in one chunk. It depends on the device only, so that two passes over the same tokens do the same arithmetic.

    A chunk takes some dozens of launches of kernels, which would take most of the time on a GPU if chunks were small. There it
    is the largest power of two with which `BUFFERS` buffers are at most the `SHARE` of the memory. The largest number was
    measured in the forward pass with entropy, `ref` and `old` (13.3: three logits, the log-probabilities and probabilities of
    two policies, and the terms of a KL); the backward pass needs 10.3.
    """
    return gpu_chunk_elements(total_memory(device)) if device.type == "cuda" else CHUNK_ELEMENTS


def gpu_chunk_elements(memory: int) -> int:
    """Logits in one chunk on a GPU with this memory in bytes."""
    most = int(SHARE * memory) // (BUFFERS * 4)
    return max(CHUNK_ELEMENTS, 2 ** (most.bit_length() - 1))


@cache
def total_memory(device: torch.device) -> int:
    """The memory of a GPU in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


class TokenStatistics(NamedTuple):
    """The results of `token_statistics`, [N] each; None for those that were not requested."""

    logp: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_kl: Tensor | None = None
    old_logp: Tensor | None = None
    old_kl: Tensor | None = None
    old_tv: Tensor | None = None
    projected_logp: Tensor | None = None
    projected_kl: Tensor | None = None
    projected_kept: Tensor | None = None
    projected_pull: Tensor | None = None
    projected_scale: Tensor | None = None

    def spread(self, micro: MicroBatch) -> TokenStatistics:
        """The same as [b, t] each: the N tokens are the micro-batch's response tokens, and elsewhere it is 0."""
        columns = {name: spread(column, micro) for name, column in self._asdict().items() if column is not None}
        return TokenStatistics(**columns)

    @property
    def projection(self) -> TokenProjection | None:
        """The tokens' projections; None if they were not requested."""
        columns = (self.projected_logp, self.projected_kl, self.projected_kept, self.projected_pull)
        return None if any(each is None for each in columns) else TokenProjection(*columns)  # type: ignore[arg-type]


class TokenOutputs(NamedTuple):
    """The results of one forward pass at a micro-batch's response tokens, [b, t] each unless stated.

    logp: log π(token). values: [b, t + 1], the value before each token and after the last. hidden: [N, H], the states
    that predict the N tokens that count. entropy: of π. ref_logp: log π_ref(token); ref_kl: exact KL(π‖π_ref). old_logp:
    log π_old(token); old_kl, old_tv: exact KL(π_old‖π) and total variation. projection: of π onto a ball around π_old. The
    last seven are None unless requested.
    """

    logp: Tensor
    values: Tensor
    hidden: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_kl: Tensor | None = None
    old_logp: Tensor | None = None
    old_kl: Tensor | None = None
    old_tv: Tensor | None = None
    projection: TokenProjection | None = None

    @classmethod
    def of(cls, token: TokenStatistics, values: Tensor, hidden: Tensor) -> TokenOutputs:
        """From statistics [b, t]."""
        shared = {name: each for name, each in token._asdict().items() if name in cls._fields}
        return cls(values=values, hidden=hidden, projection=token.projection, **shared)


def spread(values: Tensor, micro: MicroBatch) -> Tensor:
    """Values [N] of the response tokens as [b, t], 0 elsewhere."""
    shape = micro.response_mask.shape
    return values.new_zeros(shape.numel()).index_copy(0, micro.tokens, values).view(shape)


_CONSTANT = ("ref_logp", "old_logp", "old_tv", "projected_kept", "projected_pull", "projected_scale")
"""Statistics without a gradient: a log-probability of a snapshot depends on that only, and the others are measurements."""


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
    limit: float | None = None,
) -> TokenStatistics:
    """Log-probabilities of `targets` [N] from `hidden` [N, H], and further statistics of the same logits.

    Every distribution is softmax(logits / temperature). entropy: in nats. With `ref`: log π_ref(target) and the exact
    KL(π‖π_ref). With `old`: log π_old(target), the exact KL(π_old‖π) and the total variation; with a `limit` too,
    the projection of π onto KL(·‖π_old) ≤ `limit`, in nats (see `TokenProjection`). Gradients flow to `hidden` and to the
    trainable parameters in `head.parameters()`, never to a snapshot. Chunk boundaries depend only on N, V and the
    device, so that two passes over the same tokens do the same arithmetic.
    """
    snapshots = {name: snapshot for name, snapshot in (("ref", ref), ("old", old)) if snapshot is not None}
    plan = _Plan(head, vocab_size, temperature, entropy, snapshots, limit)
    trained = [p for p in getattr(head, "parameters", tuple)() if p.requires_grad]
    return TokenStatistics(*_Chunked.apply(hidden, targets, plan, *trained))  # type: ignore[no-untyped-call]


class _Plan(NamedTuple):
    """The arguments of `token_statistics` that have no gradient."""

    head: Head
    vocab_size: int
    temperature: float
    entropy: bool
    snapshots: dict[str, PolicySnapshot]
    limit: float | None

    def logits(self, head: Head, hidden: Tensor) -> Tensor:
        """Logits divided by the temperature, in float32 or higher precision."""
        logits = head(hidden)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits / self.temperature if self.temperature != 1.0 else logits

    def snapshot_logits(self, rows: slice, needed: dict[str, bool] | None = None) -> dict[str, Tensor]:
        """The logits of the snapshots, or of those that are needed."""
        snapshots = {name: each for name, each in self.snapshots.items() if needed is None or needed[name]}
        return {name: self.logits(each.head, each.hidden[rows]) for name, each in snapshots.items()}

    def chunks(self, rows: Tensor, elements: int) -> Iterator[slice]:
        """Slices of `rows` with at most `elements` logits; one empty slice for no rows."""
        size = max(1, elements // self.vocab_size)
        return (slice(start, start + size) for start in range(0, max(1, len(rows)), size))

    def blocks(self, chunk: Tensor) -> Iterator[slice]:
        """On a CPU, blocks small enough for its cache to hold the result of one operation for the next; else the chunk."""
        on_cpu = chunk.device.type == "cpu"
        return self.chunks(chunk, CACHE_ELEMENTS if on_cpu else chunk_elements(chunk.device))


class _Chunked(torch.autograd.Function):
    """The fields of `TokenStatistics`. Neither pass keeps anything of a chunk, not even a node of the graph: small pieces
    between large ones would prevent the allocator from reusing the memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, plan: _Plan, *trained: Tensor) -> tuple[Tensor | None, ...]:
        device = hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # For the backward pass; without a cache, which would reuse the freed graph of another chunk.
        ctx.autocast = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        ctx.plan, ctx.trained = plan, trained
        ctx.set_materialize_grads(False)
        columns: dict[str, Tensor] = {}
        for chunk in plan.chunks(hidden, chunk_elements(hidden.device)):
            found = _chunk_columns(hidden[chunk], targets[chunk], chunk, plan)
            columns = columns or {name: each.new_empty(len(hidden)) for name, each in found.items()}
            for name, each in found.items():
                columns[name][chunk] = each
        ctx.save_for_backward(hidden, targets, columns.get("projected_scale"))
        ctx.mark_non_differentiable(*(columns[name] for name in _CONSTANT if name in columns))
        return tuple(columns.get(name) for name in TokenStatistics._fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = zip(TokenStatistics._fields, gradients, strict=True)
        weights = {name: each for name, each in asked if each is not None}
        if not weights:  # a later operation stopped the gradient
            return (None,) * (3 + len(ctx.trained))
        hidden, targets, scale = ctx.saved_tensors
        scale = None if scale is None else scale.cpu()  # the host has to know which rows were projected
        # In float32 or higher: summed over many chunks in half precision, small terms would be lost.
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in ctx.trained]
        of_hidden = torch.empty_like(hidden)
        of_trained = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(ctx.trained, dtypes, strict=True)]
        for chunk in ctx.plan.chunks(hidden, chunk_elements(hidden.device)):
            part = hidden[chunk].detach().requires_grad_()
            with ctx.autocast:
                logits, gradient = _chunk_gradient(part, targets[chunk], chunk, weights, scale, ctx.plan)
            of_hidden[chunk], *others = torch.autograd.grad(
                logits, [part, *ctx.trained], gradient, allow_unused=True, materialize_grads=True
            )
            del logits, gradient  # before those of the next chunk are allocated
            for total, each in zip(of_trained, others, strict=True):
                total += each
        return of_hidden, None, None, *(each.to(p.dtype) for p, each in zip(ctx.trained, of_trained, strict=True))


def _chunk_columns(hidden: Tensor, targets: Tensor, chunk: slice, plan: _Plan) -> dict[str, Tensor]:
    """The statistics of one chunk."""
    logits, snapshots = plan.logits(plan.head, hidden), plan.snapshot_logits(chunk)
    blocks = [_block(logits[rows], targets, snapshots, rows, plan) for rows in plan.blocks(logits)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _chunk_gradient(
    hidden: Tensor, targets: Tensor, chunk: slice, weights: dict[str, Tensor], scale: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """The logits of a chunk, and the gradient of Σ weight·statistic with respect to them, computed block by block."""
    with torch.enable_grad():
        logits = plan.logits(plan.head, hidden)
    scales = torch.ones(len(logits)) if scale is None else scale[chunk]
    needed = {"ref": "ref_kl" in weights, "old": "old_kl" in weights or bool((scales < 1).any())}
    snapshots, gradient = plan.snapshot_logits(chunk, needed), torch.empty_like(logits)
    for rows in plan.blocks(logits):
        of_rows = {name: each[chunk][rows].unsqueeze(-1) for name, each in weights.items()}
        gradient[rows] = _block_gradient(logits.detach()[rows], targets, snapshots, rows, of_rows, scales[rows])
    return logits, gradient


def _block(
    logits: Tensor, targets: Tensor, snapshots: dict[str, Tensor], rows: slice, plan: _Plan
) -> dict[str, Tensor]:
    """The requested statistics of some rows of a chunk: `logits` of these rows, `targets` and `snapshots` of all rows."""
    logps, target = torch.log_softmax(logits, -1), targets[rows].unsqueeze(-1)
    out = {"logp": logps.gather(-1, target).squeeze(-1)}
    if not (plan.entropy or snapshots):
        return out
    p = logps.exp()
    if plan.entropy:
        out["entropy"] = -torch.where(logps.isneginf(), 0.0, p * logps).sum(-1)
    if "ref" in snapshots:
        ref_logps = torch.log_softmax(snapshots["ref"][rows], -1)
        out["ref_logp"] = ref_logps.gather(-1, target).squeeze(-1)
        out["ref_kl"] = divergences.kl_between(logps, ref_logps, p, ref_logps.exp())
        del ref_logps
    if "old" in snapshots:
        old_logps = torch.log_softmax(snapshots["old"][rows], -1)
        out["old_logp"] = old_logps.gather(-1, target).squeeze(-1)
        old_p = old_logps.exp()
        out["old_kl"] = divergences.kl_between(old_logps, logps, old_p, p)
        out["old_tv"] = old_p.sub_(p).abs_().sum(-1) / 2
        if plan.limit is not None:
            out |= projection.statistics(logps, old_logps, target, plan.limit)
    return out


def _block_gradient(
    logits: Tensor,
    targets: Tensor,
    snapshots: dict[str, Tensor],
    rows: slice,
    weights: dict[str, Tensor],
    scale: Tensor,
) -> Tensor:
    """The gradient of Σ weight·statistic with respect to the logits of some rows; the weights are [n, 1], the scales [n].

    For p = softmax(logits) and fixed q: ∇log p(y) = 1_y − p, ∇KL(p‖q) = p·(log(p/q) − KL(p‖q)), ∇KL(q‖p) = p − q, and
    ∇entropy = −p·(log p + entropy).
    """
    logps = torch.log_softmax(logits, -1)
    p = logps.exp()
    gradient = torch.zeros_like(p)
    if "logp" in weights:
        gradient.addcmul_(p, weights["logp"], value=-1).scatter_add_(-1, targets[rows].unsqueeze(-1), weights["logp"])
    if "entropy" in weights:
        gradient.addcmul_(p, _centred(torch.where(logps.isneginf(), 0.0, logps), p).mul_(weights["entropy"]), value=-1)
    if "ref_kl" in weights:
        d = divergences.log_ratio(logps, torch.log_softmax(snapshots["ref"][rows], -1))
        gradient.addcmul_(p, _centred(d, p).mul_(weights["ref_kl"]))
    if "old_kl" in weights:
        gradient.addcmul_(p - torch.softmax(snapshots["old"][rows], -1), weights["old_kl"])
    if "projected_logp" in weights or "projected_kl" in weights:
        old = snapshots["old"][rows] if "old" in snapshots else logits  # which is not read where no row was projected
        projection.add_gradient(gradient, logps, p, old, targets[rows].unsqueeze(-1), scale, weights)
    return gradient


def _centred(values: Tensor, p: Tensor) -> Tensor:
    """The values less their mean under p, computed in place."""
    return values.sub_((p * values).sum(-1, keepdim=True))
