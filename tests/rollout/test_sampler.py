"""Tokens sampled by inverting the distribution function, against the distribution and against exact sums."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_trustkl.rollout import sampler
from trl_trustkl.rollout.sampler import Sampler, invert, uniform_numbers

NONE = torch.zeros(1, 0, dtype=torch.long)


def sampled(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` tokens of one distribution, and their log-probabilities."""
    processor = Sampler(uniform_numbers(range(count), 1))
    return processor(NONE, logits.repeat(count, 1)).argmax(-1), processor.columns[0]


@pytest.mark.parametrize("block", [4, 43, 512])
def test_sampling_draws_from_the_distribution_and_never_a_token_of_probability_zero(block, monkeypatch):
    monkeypatch.setattr(sampler, "BLOCK", block)
    torch.manual_seed(0)
    logits = 2 * torch.randn(tiny.VOCAB)
    logits[4:9] = -math.inf  # with blocks of four tokens, a whole block and the beginning of the next one
    count = 100_000
    token, logps = sampled(logits, count)
    expected = logits.double().softmax(-1) * count
    found = torch.bincount(token, minlength=tiny.VOCAB).double()
    alive = expected > 0
    chi2 = ((found - expected).square() / expected)[alive].sum()
    assert not found[4:9].any() and chi2 < 85  # 37 degrees of freedom: more than 85 has a probability below 1 in 10,000
    torch.testing.assert_close(logps, logits.log_softmax(-1)[token])


@pytest.mark.parametrize("size", [43, 512, 1500])
def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_level(size):
    """The levels are next to each boundary between two tokens, and the sums are exact."""
    torch.manual_seed(0)
    probs = (3 * torch.randn(size)).softmax(-1)
    probs[[0, 7, size - 1]] = 0.0
    exact = [Fraction(0)]
    for prob in probs.tolist():
        exact.append(exact[-1] + Fraction(prob))
    step = Fraction(1, 2**40)  # finer than float32, and than the rounding of the sums in float64
    for sign in (-1, 1):
        levels = [min(max(each / exact[-1] + sign * step, 0), 1 - step) for each in exact[1:-1]]
        token, total = invert(probs.repeat(len(levels), 1), torch.tensor(list(map(float, levels)), dtype=torch.float64))
        wanted = [bisect_right(exact, Fraction(float(level)) * exact[-1]) - 1 for level in levels]
        assert token.squeeze(-1).tolist() == wanted
        assert total[0].item() == pytest.approx(float(exact[-1]), rel=1e-15)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("size", [43, 512, 1500])
def test_the_smallest_and_the_largest_number_give_a_token_that_has_a_probability(uniform, size):
    torch.manual_seed(1)
    for seed in range(50):
        torch.manual_seed(seed)
        probs = torch.rand(3, size).masked_fill_(torch.rand(3, size) < 0.5, 0.0)
        token, _ = invert(probs, torch.full((3,), uniform, dtype=torch.float64))
        first = [row.nonzero()[0 if uniform == 0.0 else -1].item() for row in probs]
        assert token.squeeze(-1).tolist() == first


def test_a_level_at_the_end_of_a_block_gives_a_token_that_has_a_probability(monkeypatch):
    """Blocks and their entries are summed in different orders, whose last digits differ."""
    monkeypatch.setattr(sampler, "BLOCK", 64)
    torch.manual_seed(0)
    probs = (10 * torch.randn(4000, 128)).softmax(-1)
    probs[:, 60:68] = 0.0
    ends = probs[:, :64].sum(-1, dtype=torch.float64) / probs.sum(-1, dtype=torch.float64)
    for level in (ends, torch.nextafter(ends, torch.zeros_like(ends))):
        token, _ = invert(probs, level)
        assert (probs.gather(-1, token) > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [43, 512, 1500])
def test_scores_that_are_not_finite_give_a_token_without_a_log_probability(bad, size):
    processor = Sampler(uniform_numbers(range(3), 1))
    scores = torch.zeros(3, size)
    scores[0, 0] = scores[1, size - 1] = bad
    token = processor(NONE, scores).argmax(-1)
    assert ((token >= 0) & (token < size)).all()
    assert processor.columns[0].isnan().tolist() == [True, True, False]


def test_each_token_of_a_response_has_its_own_number():
    numbers = uniform_numbers(range(5), 7)
    processor = Sampler(numbers)
    tokens = [processor(NONE, torch.zeros(5, 1000)).argmax(-1) for _ in range(7)]
    assert torch.equal(torch.stack(tokens, dim=1), (numbers * 1000).long())
    assert len(processor.columns) == 7


def test_random_numbers_depend_on_the_seed_and_the_row_alone():
    before = torch.get_rng_state()
    numbers = uniform_numbers([5, 4, 3, 2, 1, 0], 9)
    assert torch.equal(torch.get_rng_state(), before), "the global random state changed"
    assert numbers.dtype == torch.float64 and torch.equal(uniform_numbers([3, 5], 9), numbers[[2, 0]])
    assert not torch.equal(uniform_numbers([6, 4, 3, 2, 1, 0], 9)[:1], numbers[:1])
    assert len(numbers.unique()) == 54 and numbers.min() >= 0 and numbers.max() < 1
