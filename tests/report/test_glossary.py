"""The glossary of a report explains what its tables name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.report.test_html_groups import GROUP
from trl_trustkl.report.glossary import GLOSSARY
from trl_trustkl.report.series import COUNTERFACTUALS
from trl_trustkl.report.tables import COMPARED, UPDATE_COLUMNS, settings

TERMS = {term for terms in GLOSSARY for term in terms.split(", ")}
EVERY_LIMIT = {
    "trust__mask_limit": 0.1, "trust__limit": 0.02, "trust__limit_token": 0.1, "trust__limit_response": 1.0,
    "anchor__limit": 9.0,
}  # fmt: skip
CHOICES = ("kl_controller", "kl_controller_kwargs", "trust_controller", "trust_controller_kwargs", "seed")
GROUPS_OF_SETTINGS = {"model": {}, "versions": {}, "hardware": {}, "options": dict.fromkeys(CHOICES, "x")}


def unexplained(cells: Iterable[str]) -> set[str]:
    """The names in the cells of which the glossary has none; "β (kl_coef)" is two names of one thing."""
    return {cell for cell in cells if not TERMS & set(re.split(r", | \(|\)", cell))}


def test_every_column_and_mechanism_of_the_updates_is_in_it() -> None:
    assert unexplained(UPDATE_COLUMNS) == set()
    assert unexplained([*COUNTERFACTUALS, "none", "unknown", "rejected"]) == set()
    assert unexplained(["made up", *UPDATE_COLUMNS]) == {"made up"}


def test_every_setting_is_in_it(run_of) -> None:
    advantage = {"estimator": "rloo", "num_generations": 8, "groups": 2, "groups_without_signal": 0}
    runs = [
        run_of(3, **EVERY_LIMIT), run_of(3, advantage=advantage), run_of(3, **GROUP | {"anchor__coef": 0.1}),
        run_of(3, **GROUP),
    ]  # fmt: skip
    for run in runs:
        head, rows = settings(run._replace(settings=GROUPS_OF_SETTINGS))
        assert unexplained([head[0], *(row[0] for row in rows)]) == set()
        assert unexplained(row[1].replace("episodes per", "episodes, per") for row in rows) == set()


def test_every_row_of_runs_side_by_side_is_made_of_its_terms() -> None:
    for title in COMPARED:
        assert any(term in title.lower() for term in map(str.lower, TERMS)), title
