"""Columns of a run's records."""

from __future__ import annotations

from trl_trustkl.report.series import shares


def test_shares_are_those_on_record_and_derived_where_there_are_none(run_of) -> None:
    said = {"anchor": 0.1, "clip": 0.05, "penalty": 0.4, "stop": 0.3, "backtrack": 0.2, "grad_norm": 0.15, "lr": 0.25}
    changes = {"trust__stopped": True, "trust__epochs": 1.0, "gradient__scale": 0.5}
    recorded = shares(run_of(shares=lambda p: said if p > 0.5 else None, **changes).records)
    assert {name: values[-1] for name, values in recorded.items()} == said
    assert {name: values[0] for name, values in recorded.items()} == {
        "anchor": 0.2, "clip": 0.1, "penalty": 0.0, "stop": 0.0, "backtrack": 0.0, "grad_norm": 0.5, "lr": 0.0,
    }  # fmt: skip
