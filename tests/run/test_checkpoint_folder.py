"""Folders of checkpoints: which of them are complete, and which are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import survival
from tests.survival import build
from trl_trustkl.errors import CheckpointError, SaveError
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run.checkpointer import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


# -- folders of any files ----------------------------------------------------------------------------------------------


def write(folder: Path, content: str = "a") -> Path:
    with checkpoint.written_atomically(folder) as unfinished:
        (unfinished / "part").mkdir()
        (unfinished / "part" / "file").write_text(content)
    return folder


def test_a_folder_is_complete_with_a_manifest_of_its_files(tmp_path):
    folder = write(tmp_path / "runs" / "checkpoint-3")
    assert names(folder.parent) == ["checkpoint-3"] and checkpoint.damage(folder) is None
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert list(files) == ["part/file"] and files["part/file"]["size"] == 1
    (folder / "part" / "file").write_text("b")
    assert checkpoint.damage(folder) == "part/file is not what was written"
    assert checkpoint.damage(folder, thorough=False) is None, "digests were compared although only sizes were requested"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("of torch"), ValueError("no")])
def test_a_folder_that_fails_leaves_the_one_before_it(tmp_path, error):
    folder = write(tmp_path / "checkpoint-3", "before")
    wanted = pytest.raises(SaveError, match=f"{type(error).__name__}.*checkpoint-3 is .* resume")
    with wanted as raised, checkpoint.written_atomically(folder) as unfinished:
        (unfinished / "file").write_text("half")
        raise error
    assert raised.value.__cause__ is error
    assert names(tmp_path) == ["checkpoint-3"] and (folder / "part" / "file").read_text() == "before"


def test_checkpoints_are_ordered_by_their_number_and_nothing_else_is_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-", "checkpoint-1.5", "earlier.1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").touch()
    found = checkpoint.checkpoints(tmp_path)
    assert [checkpoint.number(folder) for folder in found] == [9, 10]
    assert checkpoint.of_update(tmp_path, 9) == found[0]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
        (1, 4, [4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_the_oldest_checkpoints_are_deleted_but_neither_the_newest_nor_the_best(tmp_path, limit, best, left):
    for number in (1, 2, 3, 4):
        write(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-0").mkdir()  # incomplete: neither counted nor deleted
    checkpoint.rotate(tmp_path, limit, best=None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [checkpoint.number(folder) for folder in checkpoint.checkpoints(tmp_path)] == [0, *left]
    assert not list(tmp_path.glob(".unfinished*"))


def test_unfinished_folders_are_removed_and_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "run" / ".unfinished-checkpoint-1" / "part").mkdir(parents=True)
    (tmp_path / "run" / ".unfinished-checkpoint-2").symlink_to(elsewhere)
    (tmp_path / "run" / ".unfinished-checkpoint-3").touch()
    checkpoint.remove_unfinished(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()) and (elsewhere / "file").exists()


def test_checkpoints_are_moved_aside_into_a_new_folder_each_time(tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / f"checkpoint-{number}")
    checkpoint.move_aside(tmp_path, after=2)
    checkpoint.move_aside(tmp_path, after=2)
    checkpoint.move_aside(tmp_path)
    assert names(tmp_path / "earlier.1") == ["checkpoint-3"]
    assert names(tmp_path / "earlier.2") == ["checkpoint-1", "checkpoint-2"]
    assert not checkpoint.checkpoints(tmp_path) and not (tmp_path / "earlier.3").exists()


# -- folders of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"cut"), "optimizer.pt has 3 bytes instead of"),
        (lambda folder: (folder / "value.safetensors").unlink(), "lacks value.safetensors"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: flip_a_byte(folder / "policy.safetensors"), "policy.safetensors is not what was written"),
        (lambda folder: flip_a_byte(folder / "optimizer.pt"), "optimizer.pt is not what was written"),
        (lambda folder: cut_in_half(folder / "adapter_model.safetensors"), "adapter_model.safetensors has"),
        (lambda folder: cut_in_half(folder / "manifest.json"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_recognised_and_the_last_complete_one_used(
    uninterrupted_run, run_copy, caplog, damage, what
):
    damage(run_copy / "checkpoint-6")
    trainer = build(run_copy)
    assert find_checkpoint(True, run_copy) == run_copy / "checkpoint-4"
    assert any(what in record.getMessage() for record in caplog.records)
    with pytest.raises(CheckpointError) as error:
        trainer.train(resume_from_checkpoint=str(run_copy / "checkpoint-6"))
    assert what in str(error.value) and "`resume_from_checkpoint`" in str(error.value)
    trainer.train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, run_copy)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_without_a_complete_checkpoint_a_run_starts_afresh_with_a_warning(uninterrupted_run, tmp_path, caplog):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".unfinished-checkpoint-2").mkdir()
    build(tmp_path).train(resume_from_checkpoint=True)
    assert any("starting a new run" in record.getMessage() for record in caplog.records)
    assert survival.same(uninterrupted_run, tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_fresh_run_moves_old_checkpoints_aside(run_copy):
    trainer = build(run_copy, max_steps=2)
    trainer.train()
    assert names(run_copy) == ["checkpoint-2"]
    assert sorted(path.name for path in (run_copy / "earlier.1").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_at_most_the_configured_number_of_checkpoints_is_kept_and_the_last_complete_one_is(tmp_path):
    build(tmp_path, save_steps=1, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    checkpoint.rotate(tmp_path, 1, best=None)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
