"""The process of one run of a comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compare.jobs import TASK
from tests.processes import ROOT
from trl_trustkl.compare import child
from trl_trustkl.report import read_run


def test_a_child_trains_the_settings_in_its_folder(tmp_path: Path) -> None:
    made_with = {"task": TASK, "updates": 2, "seed": 5, "config": {"kl_coef": 0.3, "clip_rule": "none"}}
    child.write(tmp_path / child.SETTINGS_FILE, made_with)
    child.run(tmp_path)
    run = read_run(tmp_path)
    assert [record.update for record in run.records] == [1, 2]
    assert {(record.anchor.coef, record.trust.rule) for record in run.records} == {(0.3, "none")}
    assert json.loads((tmp_path / child.DONE_FILE).read_text()) == made_with


@pytest.mark.processes
def test_a_child_ends_with_its_parent() -> None:
    code = "import time; from trl_trustkl.compare.child import end_with_parent; end_with_parent(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    process.stdin.close()  # the system does this when the parent ends
    assert process.wait(timeout=60) == 143
