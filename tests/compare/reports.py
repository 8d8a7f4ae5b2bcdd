"""Made-up results of comparisons, and a report of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.example_runs import SAMPLE_KEYS, completions_of, rows_of, write_run
from tests.pages import ATTACKS
from trl_trustkl.compare import page
from trl_trustkl.compare.conclusions import conclude
from trl_trustkl.compare.metrics import Result, result
from trl_trustkl.report import read_run


def ordinary(folder: Path, seeds: Sequence[int] = (1, 2)) -> list[Result]:
    """Two settings, each with one run per seed."""
    found = []
    for name, score in (("a", 0.2), ("b", 0.6)):
        runs = {}
        for seed in seeds:
            rows = rows_of(4, score=score + seed / 100)
            runs[seed] = read_run(write_run(folder / name / str(seed), rows, completions_of(rows)))
        found.append(result(name, {"kl_coef": score}, runs, last=1))
    return found


def hostile(folder: Path) -> list[Result]:
    """One setting per attack; the attack is its name and a text of its configuration, records and completions."""
    found = []
    for number, attack in enumerate(ATTACKS):
        rows = rows_of(3)
        for row in rows:
            row["binding"] = row["trust"]["rule"] = attack
        kept = [{**SAMPLE_KEYS, "update": row["update"], "prompt": attack, "completion": attack} for row in rows]
        run = read_run(write_run(folder / str(number), rows, kept))
        found.append(result(attack, {"kl_controller_kwargs": attack}, {1: run, 2: run}, last=1))
    return found


def as_report(results: list[Result], **changes: Any) -> page.Report:
    report = page.Report(results, conclude(results, last=1), "task", 3, 1, 0.02, [])
    return report._replace(**changes)
