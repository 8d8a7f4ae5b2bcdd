"""Masked sums, means, moments and whitening, against torch on the selected values."""

from __future__ import annotations

import math

import pytest
import torch

from trl_trustkl.masking import kept, masked_mean, masked_moments, masked_sum, weighing_factor, whiten, whitening_factor

VALUES = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, -math.inf]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])
KEPT = VALUES[MASK]


def test_sums_and_means_leave_out_what_the_mask_does():
    assert masked_sum(VALUES, MASK) == 7
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 4]
    assert masked_mean(VALUES, MASK) == pytest.approx(7 / 3)
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 4]
    assert masked_mean(VALUES, MASK, dim=0).tolist() == [2.5, 2, 0]


def test_the_mean_of_nothing_is_0():
    assert masked_mean(VALUES, torch.zeros_like(MASK)) == 0
    assert [float(moment) for moment in masked_moments(VALUES, torch.zeros_like(MASK))] == [0, 0]


def test_moments_are_those_of_the_values_that_count():
    mean, variance = masked_moments(VALUES, MASK)
    assert float(mean) == pytest.approx(KEPT.mean().item())
    assert float(variance) == pytest.approx(KEPT.var(unbiased=True).item())
    assert float(masked_moments(VALUES[:1, :1], MASK[:1, :1])[1]) == 0, "the variance of a single value is not 0"


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_variance_1_and_mean_0_or_their_original_mean(shift_mean):
    mean, var = masked_moments(VALUES, MASK)
    whitened = whiten(VALUES, MASK, mean=mean, var=var, shift_mean=shift_mean)
    assert (whitened[~MASK] == 0).all()
    assert float(whitened[MASK].var()) == pytest.approx(1, rel=1e-6)
    assert float(whitened[MASK].mean()) == pytest.approx(0 if shift_mean else float(mean), abs=1e-12)


def test_the_whitening_factor_has_the_constant_of_trl():
    assert float(whitening_factor(torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(1e4)
    assert float(whitening_factor(torch.tensor(4.0, dtype=torch.float64))) == pytest.approx(0.5)


@pytest.mark.parametrize("mean", [0.0, 0.7, -300.0])
def test_equal_values_have_the_factor_1(mean):
    mean = torch.tensor(mean, dtype=torch.float64)
    rounding = 1e-13 * mean**2
    assert weighing_factor(mean, rounding) == 1
    var = torch.tensor(4.0, dtype=torch.float64)
    assert weighing_factor(mean, var) == whitening_factor(var)


def test_the_numbers_of_each_row_under_a_mask():
    ids, mask = torch.arange(12).view(3, 4), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert (
        kept(ids, mask)
        == [[1, 2], [], [8, 9, 10, 11]]
        == [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    )
