"""The measurement of an update, against numpy, and of micro-batches and processes together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trl_trustkl.policy.exact_kl import TokenOutputs
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.trust.measurement import QUANTILES, measure, measurement
from trl_trustkl.types import Measurement, MicroBatch, PolicySnapshot, Rollout


@pytest.mark.parametrize("seed", range(3))
def test_the_measurement_equals_that_of_numpy(seed):
    rng = np.random.default_rng(seed)
    kl, tv = rng.exponential(size=(5, 7)), rng.uniform(size=(5, 7))
    log_ratio = rng.normal(scale=3.0, size=(5, 7))
    mask = rng.uniform(size=(5, 7)) < 0.6
    for array in (kl, tv, log_ratio):
        array[~mask] = rng.choice([np.nan, np.inf, 1e9])  # values under the mask have no influence
    got = measurement(*map(torch.from_numpy, (kl, tv, log_ratio, mask)), complete=True)
    assert got.kl == pytest.approx(kl[mask].mean(), rel=1e-12)
    assert got.kl_max == pytest.approx(kl[mask].max(), rel=1e-12)
    assert got.tv == pytest.approx(tv[mask].mean(), rel=1e-12)
    assert got.max_ratio == pytest.approx(np.exp(log_ratio[mask].max()), rel=1e-12)
    assert got.tokens == mask.sum() and got.complete
    assert list(got.ratio_quantiles) == [str(q) for q in QUANTILES]
    expected = np.exp(np.quantile(log_ratio[mask], QUANTILES))
    np.testing.assert_allclose(list(got.ratio_quantiles.values()), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_responses_equal_those_of_numpy(seed):
    rng = np.random.default_rng(seed)
    kl, tv = rng.exponential(size=(5, 7)), rng.uniform(size=(5, 7))
    log_ratio = rng.normal(scale=3.0, size=(5, 7))
    mask = np.arange(7) < np.array([[6], [2], [0], [5], [1]])
    for array in (kl, tv, log_ratio):
        array[~mask] = rng.choice([np.nan, np.inf, 1e9])
    columns = list(map(torch.from_numpy, (kl, tv, log_ratio, mask)))
    found = measurement(*columns, complete=True).responses
    assert found.tokens == (6, 2, 0, 5, 1) and found.tv_max == pytest.approx(tv[mask].max(), rel=1e-12)
    moved = [sum(np.exp(log_ratio[i, :n]) - 1) for i, n in enumerate(found.tokens)]
    assert found.moved == pytest.approx(moved, rel=1e-9)
    assert found.kl == pytest.approx(kl[mask].sum() / 4, rel=1e-12), "a mean over the responses with a token"
    positions = [sum(tv[i, t] for i, n in enumerate(found.tokens) if t < n) / 4 for t in range(7)]
    assert found.tv_positions == pytest.approx(positions, rel=1e-12) and positions[-1] == 0
    assert measurement(*columns, complete=False).responses is None


def test_the_measurement_of_nothing_is_that_of_no_change():
    ones = torch.ones(2, 3)
    got = measurement(ones * math.nan, ones, ones, torch.zeros(2, 3, dtype=torch.bool), complete=False)
    assert (got.kl, got.kl_max, got.tv, got.max_ratio, got.tokens, got.complete) == (0.0, 0.0, 0.0, 1.0, 0, False)
    assert set(got.ratio_quantiles.values()) == {1.0}


def test_the_measurement_neither_overflows_nor_hides_nan():
    mask = torch.ones(1, 3, dtype=torch.bool)
    huge = measurement(mask.float(), mask.float(), torch.tensor([[0.0, 1.0, 5e4]]), mask, complete=True)
    assert math.isfinite(huge.max_ratio) and huge.max_ratio > 1e300
    assert math.isfinite(huge.responses.moved[0]) and huge.responses.moved[0] > 1e300
    broken = measurement(torch.tensor([[0.0, math.nan, 1.0]]), mask.float(), mask * math.nan, mask, complete=True)
    assert math.isnan(broken.kl) and math.isnan(broken.max_ratio)
    assert math.isnan(broken.responses.kl) and math.isnan(broken.responses.moved[0])


def test_a_mean_of_many_small_numbers_is_taken_in_float64():
    kl = torch.full((1, 100_000), 0.1)
    got = measurement(kl, kl, kl, torch.ones_like(kl, dtype=torch.bool), complete=True)
    assert got.kl == pytest.approx(float(kl[0, 0]), rel=1e-12)


class Batch:
    """Five responses in micro-batches of two, and random outputs of a comparison at each of their tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 2]).unsqueeze(-1)
        ones = torch.ones(5, 1, dtype=torch.bool)
        self.rollout = Rollout(torch.ones(5, 1, dtype=torch.long), ones, torch.ones(5, 4, dtype=torch.long), self.mask)
        self.micros = [micro_batch(self.rollout, rows) for rows in torch.tensor([3, 1, 4, 2, 0]).split(2)]
        self.old = [PolicySnapshot(torch.zeros(0), torch.nn.Identity()) for _ in self.micros]
        generator = torch.Generator().manual_seed(2)
        self.logp, self.old_logp, self.kl, self.tv = (torch.rand(5, 4, generator=generator).to(dtype) for _ in range(4))

    def compare(self, micro: MicroBatch, old: PolicySnapshot, ref: PolicySnapshot | None) -> TokenOutputs:
        assert any(micro is each and old is other for each, other in zip(self.micros, self.old, strict=True))
        length = micro.response_ids.shape[1]
        logp, old_logp, kl, tv = (each[micro.rows, :length] for each in (self.logp, self.old_logp, self.kl, self.tv))
        return TokenOutputs(logp, torch.zeros(0), hidden=torch.zeros(0), old_logp=old_logp, old_kl=kl, old_tv=tv)

    def measured(self, **options: Any) -> Measurement:
        return measure(self.compare, self.micros, self.old, self.mask, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_measured_whatever_its_micro_batches(dtype):
    batch = Batch(dtype)
    columns = (batch.kl.float(), batch.tv.float(), batch.logp.float() - batch.old_logp.float())
    assert batch.measured() == measurement(*columns, batch.mask, complete=True)


@pytest.mark.parametrize(("indices", "rows"), [([1], [4, 2]), ([0, 2], [3, 1, 0])])
def test_some_micro_batches_are_measured_by_themselves(indices, rows):
    batch = Batch()
    mask = torch.zeros_like(batch.mask)
    mask[rows] = batch.mask[rows]
    wanted = measurement(batch.kl, batch.tv, batch.logp - batch.old_logp, mask, complete=False)
    assert batch.measured(indices=indices) == wanted
    assert batch.measured(indices=range(3)).complete


def test_rows_of_other_processes_are_gathered():
    batch = Batch()
    kl, tv, log_ratio = batch.kl, batch.tv, batch.logp - batch.old_logp
    twice = [torch.cat([each, each]) for each in (kl, tv, log_ratio, batch.mask)]
    found = batch.measured(gather=lambda rows: torch.cat([rows, rows]))
    assert found == measurement(*twice, complete=True) and found.tokens == 24


def test_the_kl_to_the_reference_is_summed_over_responses_and_averaged_over_those_of_all_processes():
    batch = Batch()
    refs = [PolicySnapshot(torch.zeros(0), torch.nn.Identity()) for _ in batch.micros]
    ref_kl = torch.rand(5, 4, generator=torch.Generator().manual_seed(7))

    def compare(micro: MicroBatch, old: PolicySnapshot, ref: PolicySnapshot | None) -> TokenOutputs:
        assert any(micro is each and ref is other for each, other in zip(batch.micros, refs, strict=True))
        return batch.compare(micro, old, None)._replace(ref_kl=ref_kl[micro.rows, : micro.response_ids.shape[1]])

    wanted = float((ref_kl * batch.mask).sum(1).mean())
    found = measure(compare, batch.micros, batch.old, batch.mask, ref=refs, anchor_start=0.25)
    assert found.anchor_kl == pytest.approx(wanted, rel=1e-6) and found.anchor_start == 0.25
    assert found._replace(anchor_kl=None, anchor_start=None) == batch.measured()
    padded = measure(
        compare, batch.micros, batch.old, batch.mask, ref=refs,
        gather=lambda rows: torch.cat([rows, torch.zeros_like(rows)]),
    )  # fmt: skip
    assert padded.anchor_kl == pytest.approx(wanted / 2, rel=1e-6)
