"""A report of hostile texts, shared by the tests of the page, the tables and the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.reports import as_report, hostile
from tests.pages import ATTACKS
from trl_trustkl.compare import page


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[page.Report, Path]:
    """The report and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("attacked")
    report = as_report(hostile(folder), task=ATTACKS[0], notes=list(ATTACKS))
    page.save(report, folder)
    return report, folder
