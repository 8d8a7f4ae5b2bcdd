"""Every test that docs/upstream_defects.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_table_of_defects_names_exists():
    table = (ROOT / "docs" / "upstream_defects.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)$", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for number, row in rows:
        named = re.findall(r"([\w/]+\.py)::(\w+)", row)
        assert named, f"defect {number} names no test"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
