"""The measurement of an update: exact KL(π_old‖π), total variation and ratios of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..masking import masked_mean, masked_sum
from ..types import AnchorMeasurement, Measurement, MicroBatch, PolicySnapshot, ResponseMeasurement, indices

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Comparison(Protocol):
    """The tokens of a micro-batch under a policy and π_old, [b, t] each: log π(token), log π_old(token), exact KL(π_old‖π),
    total variation, and exact KL(π‖π_ref) where the reference was given."""

    @property
    def logp(self) -> Tensor: ...
    @property
    def old_logp(self) -> Tensor | None: ...
    @property
    def old_kl(self) -> Tensor | None: ...
    @property
    def old_tv(self) -> Tensor | None: ...
    @property
    def ref_kl(self) -> Tensor | None: ...


def measure(
    compare: Callable[[MicroBatch, PolicySnapshot, PolicySnapshot | None], Comparison],
    micro_batches: Sequence[MicroBatch],
    old: Sequence[PolicySnapshot],
    response_mask: Tensor,
    *,
    ref: Sequence[PolicySnapshot] | None = None,
    anchor_start: float | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    indices: Iterable[int] | None = None,
) -> Measurement:
    """Measure a batch under the current policy against π_old, and against π_ref where it is given.

    Args:
        compare: compares the current policy with π_old, and with π_ref or None, on a micro-batch.
        micro_batches, old: the micro-batches that π_old was evaluated on, and π_old at the tokens of each.
        response_mask: the tokens that count, [B, T].
        ref: π_ref at the tokens of each micro-batch.
        anchor_start: the mean KL(π_old‖π_ref) of the batch, nats per response.
        gather: gathers rows from all processes, such as `Processes.gather`; by default there is one process.
        indices: of the micro-batches to measure; None for all, which a guarantee requires.
    """
    mask = torch.zeros_like(response_mask)
    kl, tv, log_ratio, ref_kl = (torch.zeros(mask.shape, device=mask.device) for _ in range(4))
    for index in range(len(micro_batches)) if indices is None else indices:
        micro = micro_batches[index]
        out = compare(micro, old[index], None if ref is None else ref[index])
        length = micro.response_ids.shape[1]
        mask[micro.rows, :length] = micro.response_mask
        assert out.old_logp is not None and out.old_kl is not None and out.old_tv is not None
        for column, values in (
            (kl, out.old_kl),
            (tv, out.old_tv),
            (log_ratio, out.logp.float() - out.old_logp.float()),
        ):
            column[micro.rows, :length] = values.float()
        if out.ref_kl is not None:
            ref_kl[micro.rows, :length] = out.ref_kl.float()
    mask = gather(mask)
    complete = bool((mask == gather(response_mask)).all())
    found = measurement(gather(kl), gather(tv), gather(log_ratio), mask, complete=complete)
    if ref is None:
        return found
    return found._replace(anchor_kl=mean_of_sums(gather(ref_kl), mask), anchor_start=anchor_start)


def mean_of_sums(values: Tensor, mask: Tensor) -> float:
    """The mean over responses of a sum over their tokens, from values and mask [B, T] of all processes."""
    return float(masked_sum(values, mask, dim=1).double().mean())


def anchor_measurement(
    estimate: Tensor, exact: Tensor, mask: Tensor, *, coef: float, share: float | None = None
) -> AnchorMeasurement:
    """The anchor of a batch from an estimate of KL(π‖π_ref) at each token and the exact KL of each context, [B, T] each.

    The arguments are gathered from all processes.
    """
    sums = masked_sum(exact, mask, dim=1).double()
    error = float(sums.std() / math.sqrt(len(sums))) if len(sums) > 1 else math.nan
    return AnchorMeasurement(
        coef=coef,
        kl=mean_of_sums(estimate, mask),
        kl_exact=mean_of_sums(exact, mask),
        kl_stderr=error,
        share=share,
        kl_per_token=float(masked_mean(estimate.double(), mask)),
    )


def measurement(kl: Tensor, tv: Tensor, log_ratio: Tensor, mask: Tensor, *, complete: bool) -> Measurement:
    """Summary of an update from per-token exact KL(π_old‖π), total variation and log π/π_old, [B, T] each.

    The arguments are gathered from all processes, so that every process gets the same numbers. `complete` says whether
    the mask holds every response token of the batch.
    """
    tokens = indices(mask)
    if not len(tokens):
        return Measurement(0.0, 0.0, 0.0, 0.0, 1.0, {str(q): 1.0 for q in QUANTILES}, 0, complete)
    kls, ratios = (each.flatten().index_select(0, tokens).double() for each in (kl, log_ratio))
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device=ratios.device)
    # The exponential is monotonic, so the quantiles are computed in log space.
    quantiles = torch.quantile(ratios, levels)
    largest = masked_sum(kl.double(), mask, dim=1).max()
    numbers = torch.stack([kls.mean(), kls.max(), largest, masked_mean(tv.double(), mask), ratios.max(), *quantiles])
    mean, kl_max, kl_response_max, mean_tv, *log_ratios = numbers.tolist()  # one read
    max_ratio, *found = map(_exp, log_ratios)
    return Measurement(
        kl=mean,
        kl_max=kl_max,
        kl_response_max=kl_response_max,
        tv=mean_tv,
        max_ratio=max_ratio,
        ratio_quantiles=dict(zip(map(str, QUANTILES), found, strict=True)),
        tokens=len(tokens),
        complete=complete,
        responses=_responses(kl, tv, log_ratio, mask) if complete else None,
    )


def _responses(kl: Tensor, tv: Tensor, log_ratio: Tensor, mask: Tensor) -> ResponseMeasurement:
    """The arguments are those of `measurement`, of which at least one token counts."""
    some = indices(mask.any(1))
    moved = torch.expm1(log_ratio.double().clamp(max=_LARGEST))
    tvs = torch.where(mask, tv.double(), 0.0)
    means = masked_sum(kl.double(), mask, dim=1)[some].mean(), torch.where(mask, tv.double(), -torch.inf).max()
    parts = [masked_sum(moved, mask, dim=1), mask.sum(1).double(), tvs[some].mean(0), torch.stack(means)]
    read = torch.cat(parts).cpu().split([len(each) for each in parts])  # one read
    moves, tokens, positions, (mean, tv_max) = (each.tolist() for each in read)
    return ResponseMeasurement(
        moved=tuple(moves), tokens=tuple(map(int, tokens)), kl=mean, tv_max=tv_max, tv_positions=tuple(positions)
    )


_LARGEST = 700.0  # of a log-ratio: its exponential is finite


def _exp(log_ratio: float) -> float:
    return math.exp(min(log_ratio, _LARGEST)) if math.isfinite(log_ratio) else math.nan
