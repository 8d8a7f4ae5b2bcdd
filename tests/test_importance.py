"""Importance weights against their definition, token by token, at ordinary ratios, at extreme ones and under a mask."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from trl_trustkl.importance import LARGEST_LOG_RATIO, CorrectionMode, importance_weights

MODES = get_args(CorrectionMode)
BOUNDS = [(None, None), (None, 3.0), (None, 1.0), (0.5, None), (0.5, 2.0), (0.0, 0.9), (0.9, 1.1)]
every_mode = pytest.mark.parametrize("mode", MODES)


def by_definition(
    old: Tensor, sampler: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> tuple[list[list[float]], list[list[bool]]]:
    """Weights and whether a bound changed them, from probabilities as numbers of Python."""
    weights, changed = [], []
    for olds, samplers, counts in zip(old.tolist(), sampler.tolist(), mask.tolist(), strict=True):
        ratios = [math.exp(o) / math.exp(s) for o, s, c in zip(olds, samplers, counts, strict=True) if c]
        if mode in ("sequence_truncate", "sequence_mask"):
            ratios = [math.prod(ratios)] * len(ratios)
        found = []
        for ratio in ratios:
            if high is not None and ratio > high:
                found.append((high if mode in ("token_truncate", "sequence_truncate") else 0.0, True))
            elif low is not None and ratio < low:
                found.append((low if mode in ("token_truncate", "sequence_truncate") else 0.0, True))
            else:
                found.append((ratio, False))
        entries = iter(found)
        row = [next(entries) if count else (1.0, False) for count in counts]
        weights.append([weight for weight, _ in row])
        changed.append([bound for _, bound in row])
    return weights, changed


def example(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of 6 responses of up to 5 tokens, with gaps in the mask, and an empty response."""
    draw = torch.Generator().manual_seed(seed)
    old, sampler = (-3 * torch.rand(6, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 5, generator=draw) < 0.7
    mask[2] = False
    return old, sampler, mask


@every_mode
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_the_weights_are_those_of_the_definition(mode, low, high):
    reached = 0
    for seed in range(5):
        old, sampler, mask = example(seed)
        found = importance_weights(old, sampler, mask, mode, low=low, high=high)
        weights, changed = by_definition(old, sampler, mask, mode, low, high)
        torch.testing.assert_close(found.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)
        assert found.truncated.tolist() == changed
        reached += int(found.truncated.sum())
    assert (reached > 0) == ((low, high) != (None, None)), "the bounds were not reached"


def test_the_default_is_the_ratio_of_a_token_up_to_3():
    old, sampler, mask = example(7)
    expected = torch.where(mask, (old - sampler).exp().clamp(max=3.0), 1.0)
    torch.testing.assert_close(importance_weights(old, sampler, mask).weights, expected, rtol=1e-12, atol=0)


@every_mode
def test_a_ratio_at_a_bound_is_within_it(mode):
    ratios = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    found = importance_weights(
        ratios.log2() * math.log(2), torch.zeros(2, 1), torch.ones(2, 1).bool(), mode, low=0.5, high=2.0
    )
    assert found.weights.tolist() == ratios.tolist() and not found.truncated.any()


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [50.0, 1e4, math.inf])
def test_an_extreme_ratio_is_finite(mode, dtype, far):
    """A token that π_old has with probability 0, or the sampler by its log-probability."""
    old, sampler = torch.tensor([[-far, -1.0], [-1.0, -1.0]]), torch.tensor([[-1.0, -1.0], [-far, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    free = importance_weights(old.to(dtype), sampler.to(dtype), mask, mode, high=None)
    assert free.weights.isfinite().all() and (free.weights >= 0).all() and not free.truncated.any()
    assert float(free.weights[0, 0].log()) == pytest.approx(-LARGEST_LOG_RATIO, rel=1e-5)
    assert float(free.weights[1, 0].log()) == pytest.approx(LARGEST_LOG_RATIO, rel=1e-5)
    bounded = importance_weights(old.to(dtype), sampler.to(dtype), mask, mode, low=0.1, high=3.0)
    outside = [[True, mode.startswith("sequence")]] * 2
    kept = (0.1, 3.0) if mode.endswith("truncate") else (0.0, 0.0)
    assert bounded.truncated.tolist() == outside
    for row, weight in zip(bounded.weights.tolist(), kept, strict=True):
        assert row == pytest.approx([weight, weight if mode.startswith("sequence") else 1.0])


@every_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_outside_of_the_mask_is_ignored(mode, bad):
    old, sampler, mask = example(1)
    wanted = importance_weights(old, sampler, mask, mode, low=0.5, high=2.0)
    for poisoned in itertools.product([old, old.masked_fill(~mask, bad)], [sampler, sampler.masked_fill(~mask, bad)]):
        found = importance_weights(*poisoned, mask, mode, low=0.5, high=2.0)
        assert torch.equal(found.weights, wanted.weights) and torch.equal(found.truncated, wanted.truncated)
    assert (wanted.weights[~mask] == 1).all() and not wanted.truncated[~mask].any()


@every_mode
def test_a_number_that_is_missing_inside_of_the_mask_stays_missing(mode):
    old, sampler, mask = torch.zeros(1, 2), torch.tensor([[math.nan, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    found = importance_weights(old, sampler, mask, mode, low=0.5, high=2.0)
    assert found.weights.isnan().tolist() == [[True, mode.startswith("sequence")]] and not found.truncated.any()


@every_mode
def test_an_empty_batch_and_a_batch_without_tokens(mode):
    for shape in ((0, 3), (2, 0), (2, 3)):
        found = importance_weights(torch.ones(shape), torch.zeros(shape), torch.zeros(shape).bool(), mode, low=0.5)
        assert found.weights.shape == found.truncated.shape == shape
        assert (found.weights == 1).all() and not found.truncated.any()


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_have_the_dtype_of_the_training_pass(mode, dtype):
    old, sampler, mask = example(2)
    assert importance_weights(old.float(), sampler.to(dtype), mask, mode).weights.dtype == torch.float32


def test_a_mask_of_responses_drops_what_a_bound_of_tokens_leaves_alone():
    """At 0.002 nats per token, 500 tokens and normal log-ratios: the numbers in docs/mathematics.md."""
    per_token, length, dropped = 0.002, 500, {}
    noise = torch.randn(4000, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for samples, shift in (("of μ", -per_token), ("of π_old", per_token)):  # so that E_μ[π_old/μ] = 1
        log_ratio = (2 * per_token) ** 0.5 * noise + shift
        assert float(log_ratio.sum(1).std()) == pytest.approx(1.4, abs=0.05)
        arguments = log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)
        assert not importance_weights(*arguments, "token_truncate").truncated.any()
        dropped[samples] = float(importance_weights(*arguments, "sequence_mask").truncated[:, 0].double().mean())
    of_mu = (2 * per_token) ** 0.5 * noise - per_token
    assert float((of_mu.exp() - 1 - of_mu).mean()) == pytest.approx(per_token, rel=0.01)  # k3
    assert dropped == {"of μ": pytest.approx(0.07, abs=0.01), "of π_old": pytest.approx(0.47, abs=0.02)}
