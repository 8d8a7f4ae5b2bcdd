"""What an update moved: exact KL(π_old‖π), total variation and ratios of a batch, summarised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masking import masked_mean
from ..types import Measurement

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def measurement(kl: Tensor, tv: Tensor, log_ratio: Tensor, mask: Tensor, *, complete: bool) -> Measurement:
    """Summary of an update from per-token exact KL(π_old‖π), total variation and log π/π_old, [B, T] each.

    The arguments are pooled over all processes, so that every process gets the same numbers. `complete` says whether the
    mask holds every response token of the batch.
    """
    count = int(mask.sum())
    if count == 0:
        return Measurement(0.0, 0.0, 0.0, 1.0, {str(q): 1.0 for q in QUANTILES}, 0, complete)
    kls, ratios = kl[mask].double(), log_ratio[mask].double()
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device=ratios.device)
    # The exponential is monotonic, so quantiles are taken in log space and only then exponentiated.
    quantiles = _exp(torch.quantile(ratios, levels))
    return Measurement(
        kl=float(kls.mean()),
        kl_max=float(kls.max()),
        tv=float(masked_mean(tv.double(), mask)),
        max_ratio=_exp(ratios.max().unsqueeze(0))[0],
        ratio_quantiles=dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        tokens=count,
        complete=complete,
    )


def _exp(log_ratio: Tensor) -> list[float]:
    return [math.exp(min(x, 700.0)) if math.isfinite(x) else math.nan for x in log_ratio.tolist()]
