"""Sums, means and whitening under a mask, which is True where a token counts.

Shapes: B sequences, T response positions. A masked mean over nothing is 0, not NaN, so that a batch in which every row was
left out gives a loss of 0.
"""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor


def kept(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The numbers of each row where `mask` is True, from one read of all rows.

    >>> kept(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[True, False], [True, True]]))
    [[5], [7, 8]]
    """
    return [list(compress(*row)) for row in zip(ids.tolist(), mask.tolist(), strict=True)]


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is True. Values under a False mask are ignored, NaN and inf included."""
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is True; 0 where no token counts."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased (Bessel-corrected) variance of `values` under the mask; (0, 0) where no token counts."""
    mean = masked_mean(values, mask)
    squares = masked_sum((values - mean) ** 2, mask)
    return mean, squares / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, mean: Tensor, var: Tensor, shift_mean: bool = True) -> Tensor:
    """(values − mean) / √(var + 1e-8) under the mask, 0 elsewhere; with `shift_mean=False` the mean is added back.

    The moments are arguments, so that several processes can whiten with the moments of the gathered batch.
    """
    whitened = (values - mean) * whitening_factor(var)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros((), dtype=values.dtype, device=values.device))


def whitening_factor(var: Tensor) -> Tensor:
    """The factor of whitening, 1/√(var + 1e-8), with TRL's constant."""
    return torch.rsqrt(var + 1e-8)


def weighing_factor(mean: Tensor, var: Tensor) -> Tensor:
    """`whitening_factor` for a term that is added to whitened values; 1 where these are equal up to rounding.

    Equal values are 0 when whitened, and a factor of 1/√1e-8 would only make the other term huge.
    """
    return torch.where(var > 1e-12 * mean**2, whitening_factor(var), torch.ones_like(var))
