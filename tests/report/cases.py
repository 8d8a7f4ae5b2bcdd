"""The tests of findings on records that show them, and on similar ones that do not."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from trl_trustkl.report.findings import FINDINGS
from trl_trustkl.report.schema import Run

Changes = dict[str, Any]
"""Of healthy records, as for `tests.example_runs.rows_of`."""

Case = tuple[str, Changes, Changes, str, str]
"""A finding, records that show it, similar records that do not, part of the evidence, part of the advice."""


def each_of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize(
        ("name", "shows", "near", "evidence", "advice"), cases, ids=lambda case: str(case)[:24]
    )


def own(module: ModuleType) -> set[str]:
    """The names of the findings of a module."""
    return {name for name, of_run in FINDINGS.items() if of_run.__module__ == module.__name__}


def checks_of(names: set[str], cases: list[Case]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two tests of the findings of a module: each of them has a case, and each case is found."""

    def every_finding_has_a_case() -> None:
        assert {case[0] for case in cases} == names

    @each_of(cases)
    def findings(
        run_of: Callable[..., Run], name: str, shows: Changes, near: Changes, evidence: str, advice: str
    ) -> None:
        assert_found(run_of, name, shows, near, evidence, advice)

    return every_finding_has_a_case, findings


def assert_found(
    run_of: Callable[..., Run], name: str, shows: Changes, near: Changes, evidence: str, advice: str
) -> None:
    """The finding says `evidence` and `advice` of a run that shows it, and nothing of one that is near to it."""
    finding = FINDINGS[name](run_of(**shows))
    assert finding is not None and finding.name == name
    assert evidence in finding.evidence
    assert advice in finding.advice and "=" in finding.advice, finding.advice
    assert "nan" not in " ".join(finding).lower()
    assert FINDINGS[name](run_of(**near)) is None
