"""The certificate of an update, from measurements written by hand, and on the responses of an enumerated policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trl_trustkl.bounds import error_bounds
from trl_trustkl.certificate import certificate, is_certified
from trl_trustkl.records import CertificateRecord
from trl_trustkl.trust.measurement import measurement
from trl_trustkl.types import Measurement, ResponseMeasurement

REWARDS = torch.tensor([0.5, math.nan, 2.5, 1.0])
RESPONSES = ResponseMeasurement(
    moved=(-0.1, 50.0, 0.3, 0.2), tokens=(2, 1, 3, 3), kl=1e-4, tv_max=0.01, tv_positions=(0.004, 0.003, 0.002)
)
SIX = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
CLEAR: dict[str, Any] = {"moved": (-0.3, -0.3, -0.2, 0.2, 0.3, 0.3), "tokens": (3,) * 6}
"""Six responses of which the better half became likelier, so that the gain has a small standard error."""
MEASURED = Measurement(4e-5, 2e-4, 3e-4, 0.003, 1.3, {"0.5": 1.0}, tokens=9, complete=True, responses=RESPONSES)


def of(rewards: Any = REWARDS, horizon: int = 4, kl_max: float = 2e-4, **changes: Any) -> CertificateRecord | None:
    return certificate(
        rewards, MEASURED._replace(kl_max=kl_max, responses=RESPONSES._replace(**changes)), horizon=horizon
    )


def least(found: CertificateRecord) -> float:
    """The gain less two standard errors."""
    return found.gain - 2 * found.stderr


def test_a_certificate_by_hand() -> None:
    """The three responses with a reward: 0.5, 2.5 and 1; the others' means are 1.75, 0.75 and 1.5."""
    terms = torch.tensor([-1.25 * -0.1, 1.75 * 0.3, -0.5 * 0.2], dtype=torch.float64)
    found = of()
    assert found is not None
    assert (found.gain, found.stderr) == pytest.approx((float(terms.mean()), float(terms.std()) / 3**0.5))
    kl, tv = 2e-4, 0.01
    root = [min(left * tv, math.sqrt(left * kl / 2)) for left in (3, 2, 1)]
    adaptive = 2 * sum(a * b for a, b in zip((0.004, 0.003, 0.002), root, strict=True))
    mixed_tv = 2 * 3 * tv * min(0.009, math.sqrt(1e-4 / 2))
    assert found.bound == pytest.approx(2 * min(adaptive, mixed_tv)) and found.smallest == "adaptive"
    assert found.difference == found.gain - found.bound > 0
    assert not is_certified(found), "the difference is below two standard errors"


def test_a_gain_clearly_above_the_bound_is_certified_and_one_of_a_single_ratio_is_not() -> None:
    found = of(SIX, **CLEAR)
    assert found is not None and found.difference > 2 * found.stderr and is_certified(found)
    assert found.kl_needed == 2e-4
    by_chance = of(SIX, **CLEAR | {"moved": (-0.3, -0.3, -0.3, 0.3, 0.3, 90.0)})
    assert by_chance is not None and by_chance.difference > 5 and not is_certified(by_chance)
    assert by_chance.kl_needed is None or by_chance.kl_needed < 2e-4


def test_the_bound_is_the_smallest_of_all() -> None:
    found = of(horizon=400, tv_positions=(0.01,) * 400, kl=1e-5, kl_max=1e-3)
    assert found is not None and found.smallest == "mixed_tv"
    assert found.bound == pytest.approx(2 * 2 * 399 * 0.01 * math.sqrt(1e-5 / 2))


def test_the_horizon_is_at_least_that_of_the_batch() -> None:
    assert of(horizon=1) == of(horizon=3) != of(horizon=4)


@pytest.mark.parametrize("kl", [0.02, 2.0])
def test_the_kl_that_is_needed_is_where_the_bound_equals_the_gain(kl: float) -> None:
    """With a total variation so large that the bounds have no simple power of the step."""
    half = {"moved": tuple(each / 4 for each in CLEAR["moved"]), "tokens": CLEAR["tokens"]}
    found = of(SIX, kl_max=kl, **half, kl=3 * kl, tv_max=0.9, tv_positions=(0.4, 0.3, 0.2))
    assert found is not None and found.difference < 0 and found.kl_needed is not None
    scale = math.sqrt(found.kl_needed / kl)
    bound = min(
        error_bounds(
            4, kl_max=scale**2 * kl, kl_sequence=scale**2 * 3 * kl, tv_max=scale * 0.9, width=1.0,
            tv_sequence=min(1, scale * 0.9, scale * math.sqrt(3 * kl / 2)),
            tv_positions=[scale * tv for tv in (0.4, 0.3, 0.2)],
        )
    )  # fmt: skip
    assert 0 < scale < 1 and bound == pytest.approx(scale * least(found), rel=1e-6)


def test_for_a_small_step_it_is_the_square_of_gain_over_bound() -> None:
    small = {"moved": tuple(each / 30 for each in CLEAR["moved"]), "tokens": CLEAR["tokens"]}
    found = of(SIX, **small, tv_max=0.1, tv_positions=(0.05,) * 3, kl=0.02, kl_max=0.02)
    assert found is not None and found.smallest == "adaptive" and 0 < least(found) < found.bound / 2
    assert found.kl_needed == pytest.approx(0.02 * (least(found) / found.bound) ** 2, rel=1e-6)


def test_a_gain_that_is_not_above_zero_needs_no_limit() -> None:
    found = of(moved=(0.1, 0.0, -0.3, -0.2))
    assert found is not None and found.gain < 0 and found.kl_needed is None and found.difference < found.gain


def test_an_update_without_a_step_is_not_certified() -> None:
    found = of(moved=(0.0,) * 4, kl=0.0, tv_max=0.0, tv_positions=(0.0,) * 3, kl_max=0.0)
    assert found is not None and (found.gain, found.bound, found.difference) == (0.0, 0.0, 0.0)


def test_rounding_below_zero_and_above_one_is_no_error() -> None:
    assert of(kl_max=-1e-12, kl=-1e-12, tv_max=1.0000001) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": None},
        {"rewards": torch.tensor([1.0, math.nan, math.nan, math.nan])},
        {"rewards": torch.tensor([1.0, math.inf, 0.0, 1.0])},
        {"moved": (0.1, 0.1, math.inf, 0.1)},
        {"moved": (0.1, 0.1, math.nan, 0.1)},
        {"tokens": (2, 1, 0, 3)},
        {"kl_max": math.nan},
        {"kl_max": math.inf},
        {"kl": math.nan},
        {"tv_max": math.nan},
        {"tv_positions": (0.1, math.nan, 0.1)},
    ],
)
def test_what_cannot_be_computed_is_null(changes: dict[str, Any]) -> None:
    assert of(**changes) is None


def test_a_batch_measured_in_part_has_none() -> None:
    assert certificate(REWARDS, MEASURED._replace(responses=None), horizon=4) is None


def test_a_response_without_tokens_and_reward_does_not_matter() -> None:
    assert of(tokens=(2, 0, 3, 3)) == of()


def test_on_all_responses_of_a_policy_the_gain_is_the_surrogate_and_the_bound_holds() -> None:
    """The rows are the 64 responses of two tokens, each 50 times; π_old is uniform."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    second = torch.rand(8, 8, generator=generator, dtype=torch.float64) + 0.5
    new = first / first.sum(), second / second.sum(-1, keepdim=True)
    rewards = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    old = torch.full((8,), 1 / 8, dtype=torch.float64)
    a, b = torch.cartesian_prod(torch.arange(8), torch.arange(8)).T.repeat(1, 50)
    log_ratio = torch.stack([(8 * new[0][a]).log(), (8 * new[1][a, b]).log()], 1)
    kl = torch.stack([(old * (old / new[0]).log()).sum().expand(len(a)), (old * (old / new[1]).log()).sum(-1)[a]], 1)
    tv = torch.stack([(old - new[0]).abs().sum().expand(len(a)) / 2, (old - new[1]).abs().sum(-1)[a] / 2], 1)
    measured = measurement(kl, tv, log_ratio, torch.ones_like(kl, dtype=torch.bool), complete=True)
    found = certificate(rewards[a, b], measured, horizon=2)
    moved = 8 * new[0][:, None] + 8 * new[1] - 2
    surrogate = float((rewards * moved).mean())
    improvement = float((new[0][:, None] * new[1] * rewards).sum() - rewards.mean())
    assert found is not None and found.gain == pytest.approx(surrogate, rel=2e-3)
    assert abs(improvement - surrogate) <= found.bound
    assert improvement >= found.difference - 1e-3
