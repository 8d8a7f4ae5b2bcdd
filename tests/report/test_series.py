"""Columns of a run's records, and statistics of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.example_runs import QUANTILES, trl_run
from trl_trustkl.report.series import (
    attributed,
    column,
    distance,
    factors,
    first_third,
    geometric_mean,
    is_from_trl,
    kl_without,
    largest,
    last_third,
    mean,
    quantile,
    reference_per_token,
    shares,
    stderr,
    stop_share,
    token_range,
)


def test_shares_are_read_from_the_record_or_derived_if_missing(run_of) -> None:
    said = {
        "anchor": 0.1,
        "clip": 0.05,
        "response_mask": 0.35,
        "penalty": 0.4,
        "stop": 0.3,
        "backtrack": 0.2,
        "grad_norm": 0.15,
        "lr": 0.25,
    }
    changes = {"trust__stopped": True, "trust__epochs": 1.0, "gradient__scale": 0.5}
    recorded = shares(run_of(shares=lambda p: said if p > 0.5 else None, **changes).records)
    assert {name: values[-1] for name, values in recorded.items()} == said
    assert {name: values[0] for name, values in recorded.items()} == {
        "anchor": 0.2, "clip": 0.1, "response_mask": 0.0, "penalty": 0.0, "stop": 0.0, "backtrack": 0.0, "grad_norm": 0.5,
        "lr": 0.0,
    }  # fmt: skip


def test_a_column_has_nan_where_a_number_is_missing(run_of) -> None:
    records = run_of(4, trust__limit=lambda p: 0.02 if p > 0.5 else None).records
    np.testing.assert_array_equal(column(records, "trust.limit"), [np.nan, np.nan, 0.02, 0.02])
    np.testing.assert_array_equal(column(records, "update"), [1, 2, 3, 4])


def test_the_distance_is_the_exact_kl_or_the_estimate_where_there_is_none(run_of) -> None:
    records = run_of(4, anchor__kl_exact=lambda p: 3.0 if p > 0.5 else None, anchor__kl=2.0).records
    assert distance(records).tolist() == [2, 2, 3, 3]


def test_records_of_trl_trainers_are_recognised_by_their_missing_keys(tmp_path, run_of) -> None:
    assert is_from_trl(trl_run(tmp_path).records)
    assert not is_from_trl(run_of().records)
    assert not is_from_trl(run_of(2, trust__kl=None, anchor__kl_exact=None).records)


def test_quantiles_go_by_their_level(run_of) -> None:
    records = run_of(2, trust__ratio_quantiles=lambda p: {} if p < 1 else QUANTILES).records
    np.testing.assert_array_equal(quantile(records, "0.99"), [np.nan, 1.4])


@pytest.mark.parametrize(
    ("rule", "low", "high", "expected"),
    [
        ("ppo", 0.2, 0.28, (0.8, 1.28)),
        ("cispo", None, 4.0, (0.0, 5.0)),
        ("ppo", 0.2, None, None),
        ("sapo", 0.2, 0.2, None),
        ("gspo", 0.2, 0.2, None),
        ("none", 0.2, 0.2, None),
    ],
)
def test_the_range_of_a_tokens_ratio(run_of, rule, low, high, expected) -> None:
    trust = run_of(1, trust__rule=rule, trust__low=low, trust__high=high).records[0].trust
    assert token_range(trust) == (None if expected is None else pytest.approx(expected))


def test_statistics_of_what_there_is() -> None:
    values = np.array([1.0, np.nan, 3.0, np.inf])
    assert (mean(values), largest(values)) == (2.0, 3.0)
    assert stderr(values) == pytest.approx(np.sqrt(2) / np.sqrt(2)) and stderr(values[:2]) == 0.0
    assert np.isnan(mean(values[1:2])) and np.isnan(largest(values[:0]))
    assert first_third(range(7)) == range(2) and last_third(range(7)) == range(5, 7)
    assert first_third([8, 9]) == [8] and last_third([8, 9]) == [9]


def test_the_share_of_an_early_stop_is_that_of_the_epochs_left_out(run_of) -> None:
    changes = {"trust__stopped": lambda p: p < 1, "trust__epochs": lambda p: 0.5 if p < 1 else 2.0}
    assert stop_share(run_of(2, **changes).records).tolist() == [0.75, 0.0]
    recorded = run_of(2, **changes, shares={"stop": 0.4})
    assert stop_share(recorded.records).tolist() == [0.4, 0.4]


def test_the_kl_without_a_mechanism_is_compared_with_the_kl_as_it_was(run_of) -> None:
    """The second update has no counterfactual, the fourth none without the anchor; the penalty is off."""
    without = [
        {"anchor": 0.005, "clip": 0.02, "penalty": None, "made up": 9.0}, None, {"anchor": 0.0, "clip": 0.04},
        {"anchor": None, "clip": 0.01},
    ]  # fmt: skip
    records = run_of(
        4, counterfactual=lambda p: without[round(4 * p) - 1], trust__kl=lambda p: 0.01 if p < 1 else 0.0
    ).records
    assert [record.update for record in attributed(records)] == [1, 3, 4]
    found = kl_without(records)
    assert list(found) == ["anchor", "clip"]
    np.testing.assert_array_equal(found["anchor"], [0.005, np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(found["clip"], [0.02, np.nan, 0.04, 0.01])
    np.testing.assert_array_equal(factors(records)["anchor"], [0.5, np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(factors(records)["clip"], [2.0, np.nan, 4.0, np.nan])


def test_no_counterfactual_is_made_up(run_of) -> None:
    records = run_of(2).records
    assert attributed(records) == [] and kl_without(records) == {} == factors(records)
    assert kl_without(run_of(2, counterfactual={"clip": None}).records) == {}
    rounded = run_of(2, counterfactual={"clip": 0.01}, trust__kl=lambda p: -1e-12 if p < 1 else 0.01).records
    np.testing.assert_array_equal(factors(rounded)["clip"], [np.nan, 1.0])
    overflown = factors(run_of(1, counterfactual={"clip": 1e300}, trust__kl=1e-300).records)["clip"]
    assert np.isnan(overflown).all()


def test_the_geometric_mean_is_not_decided_by_a_single_zero() -> None:
    assert geometric_mean(np.array([2.0, 8.0, np.nan])) == pytest.approx(4.0)
    assert geometric_mean(np.array([0.0, 10.0, 10.0, 10.0])) == pytest.approx(1.0)
    assert geometric_mean(np.array([1e9, 0.1])) == pytest.approx(10.0)
    assert np.isnan(geometric_mean(np.array([np.nan])))


def test_the_likelihood_is_per_token_of_the_updates_that_kept_completions(run_of) -> None:
    run = run_of(4, lambda p: -100 * p, length=lambda p: 10.0 if p < 1 else 0.0)
    run = run._replace(completions=[row for row in run.completions if row.update != 2])
    updates, means = reference_per_token(run)
    assert updates.tolist() == [1, 3] and means.tolist() == [-2.5, -7.5]
