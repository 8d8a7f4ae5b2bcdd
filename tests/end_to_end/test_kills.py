"""A run that is killed at any moment is resumed bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import survival
from tests.survival import PHASES, build, cut_off
from trl_trustkl import load_records
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run.checkpointer import find_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("rollout", 3), ("step", 14), ("measure", 4), ("append_line", 30), ("save_file", 3), ("save", 4), ("fsync", 25),
        ("rename", 1), ("write_text", 7),
    ],
)  # fmt: skip
def test_a_run_cut_off_at_a_moment_is_resumed_bit_for_bit(uninterrupted_run, tmp_path, name, number):
    assert cut_off(build(tmp_path), (name, number)) == name
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_run_cut_off_while_an_old_checkpoint_is_deleted_is_resumed(tmp_path, monkeypatch):
    build(tmp_path / "uninterrupted", save_total_limit=1).train()
    trainer = build(tmp_path / "cut", save_total_limit=1)
    renames: list[Any] = []
    rename = os.rename

    def killed_after_the_third(
        *args: Any,
    ) -> None:  # checkpoint-2 finished, checkpoint-4 finished, checkpoint-2 to be deleted
        rename(*args)
        renames.append(args)
        if len(renames) == 3:
            raise survival.Killed

    monkeypatch.setattr(os, "rename", killed_after_the_third)
    with pytest.raises(survival.Killed):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    build(tmp_path / "cut", save_total_limit=1).train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "cut")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["checkpoint-6"]


def test_a_run_cut_off_between_a_checkpoint_s_rename_and_the_next_record_is_resumed(
    uninterrupted_run, tmp_path, monkeypatch
):
    trainer = build(tmp_path)
    rename = os.rename

    def killed_after_checkpoint_4(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "checkpoint-4":
            raise survival.Killed

    monkeypatch.setattr(os, "rename", killed_after_checkpoint_4)
    with pytest.raises(survival.Killed):
        trainer.train()
    monkeypatch.undo()
    resumed = build(tmp_path)
    assert find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-4" and len(load_records(tmp_path)) == 4
    resumed.train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [*((kind, 20) for kind in survival.KINDS), (survival.SMOLLM2, 1)])
def test_runs_killed_by_sigkill_are_resumed_bit_for_bit(tmp_path, kind, count):
    kills = survival.program("tests.survival", tmp_path, kind, count, 1)
    assert len(kills) == count
    assert {entry["ended"] for entry in kills} == {-signal.SIGKILL}
    assert {entry["resumed"] for entry in kills} == {0}, (tmp_path / "log").read_text()[-2000:]
    equal = [survival.same(tmp_path / "uninterrupted", Path(entry["run"])) for entry in kills]
    print(f"{sum(equal)} of {count}, killed in {', '.join(sorted({entry['in'] for entry in kills}))}")
    assert all(equal), [entry for entry, good in zip(kills, equal, strict=True) if not good]


def test_every_phase_is_a_moment(uninterrupted_run):
    assert set(PHASES) <= set(json.loads((uninterrupted_run / "moments.json").read_text()))
