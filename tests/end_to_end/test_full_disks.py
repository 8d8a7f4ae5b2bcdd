"""Full and read-only disks: what the errors say, and that the run resumes bit for bit once there is room.

The disks are simulated by an exception in the process; by a tmpfs in a separate mount namespace (`unshare`, of util-linux),
which needs no privileges where the kernel allows user namespaces, and also limits a superuser; and by a limit on the size of
files (RLIMIT_FSIZE). The tests start this file as a program, which forks the runs.
"""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import survival
from tests.survival import build, counted
from trl_trustkl import load_records
from trl_trustkl.errors import SaveError
from trl_trustkl.run import checkpoint_folder as checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]

# -- errors within the process -------------------------------------------------------------------------------------------


def no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "number"), [("save_file", 3), ("save", 4), ("fsync", 30), ("rename", 1), ("write_text", 7)]
)
def test_a_full_disk_during_a_save_ends_the_run_and_leaves_the_last_complete_checkpoint(
    uninterrupted_run, tmp_path, name, number
):
    trainer = build(tmp_path)
    with pytest.raises(SaveError) as error, counted(trainer, (name, number), no_space):
        trainer.train()
    for piece in (
        "`output_dir`",
        "checkpoint-4",
        "No space left",
        "checkpoint-2 is complete",
        "resume_from_checkpoint=True",
    ):
        assert piece in str(error.value)
    assert not list(tmp_path.glob(".unfinished*"))
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)


def test_a_full_disk_at_a_record_ends_the_run_and_the_line_cut_short_is_dropped(uninterrupted_run, tmp_path):
    with pytest.raises(OSError), counted(trainer := build(tmp_path), ("append_line", 30), no_space):
        trainer.train()
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)


def test_an_unwritable_folder_is_named(tmp_path):
    """A file in the folder's place stands for a read-only folder, because a superuser can write into that."""
    trainer = build(tmp_path / "run", max_steps=2)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / ".unfinished-checkpoint-2").write_text("a file where the folder should be")
    remove = checkpoint.remove_unfinished
    checkpoint.remove_unfinished = lambda folder: None
    try:
        with pytest.raises(SaveError, match="there is no earlier checkpoint"):
            trainer.train()
    finally:
        checkpoint.remove_unfinished = remove


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_record_that_cannot_be_written_is_a_save_error():
    from trl_trustkl.records import append_line

    with pytest.raises(SaveError, match="record of update 3 could not be appended to /dev/full"):
        append_line(Path("/dev/full"), {"update": 3})


# -- real disks ---------------------------------------------------------------------------------------------------------

OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


class Case(NamedTuple):
    """What happens to the disk in the `number`-th call of a function, and what the error says."""

    what: str
    name: str
    number: int
    reason: str
    failed: str


FULL, READ_ONLY, LIMITED = "No space left on device", "Read-only file system", "File too large"
FULL_TO_TORCH = "with 0.0 MiB free on its disk"
CASES = [
    Case("fill", "record", 2, FULL, "the record of update 3 could not be appended"),
    Case("fill", "write", 1, FULL, "checkpoint-4 could not be written"),
    Case("fill", "save_file", 3, FULL, "checkpoint-4 could not be written"),
    Case("fill", "save", 4, FULL_TO_TORCH, "checkpoint-4 could not be written"),
    Case("make read-only", "record", 2, READ_ONLY, "the record of update 3 could not be appended"),
    Case("make read-only", "write", 1, READ_ONLY, "checkpoint-4 could not be written"),
]
LIMIT = Case("limit", "write", 1, LIMITED, "checkpoint-4 could not be written")


# -- the program that the tests start ----------------------------------------------------------------------------------


def main(folder: Path, cases: list[Case]) -> None:
    """For each case: break the disk during a run, resume, repair the disk, resume. Prints a line of JSON for each."""
    survival.load_all(folder)
    assert survival.forked(lambda: survival.train(folder / "uninterrupted"), folder / "log") == 0
    for index, case in enumerate(cases):
        disk = folder / str(index)
        disk.mkdir()
        if case.what != "limit":
            mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", disk)
        print(json.dumps(one_case(case, disk / "run")), flush=True)
        if case.what != "limit":
            shutil.copytree(disk / "run", folder / f"left-{index}")
            subprocess.run(["umount", disk], check=True)
            (folder / f"left-{index}").rename(disk / "run")


def one_case(case: Case, run: Path) -> dict[str, Any]:
    disk = run.parent

    def start() -> None:
        survival.cut_off(survival.build(run), (case.name, case.number), lambda name: BREAK[case.what](disk))

    def resume(limit: bool = False) -> None:
        if limit:
            BREAK["limit"](disk)
        survival.train(run, resume=True)

    found: dict[str, Any] = {"ended": survival.forked(start, log := disk.with_name(f"{disk.name}-log"))}
    found["said"] = log.read_text().splitlines()[-1]
    found["complete"] = [folder.name for folder in checkpoint.checkpoints(run) if checkpoint.damage(folder) is None]
    found["updates"] = len(load_records(run))
    again = disk.with_name(f"{disk.name}-again")
    found["ended again"] = survival.forked(lambda: resume(limit=case.what == "limit"), again)
    found["said again"] = again.read_text().splitlines()[-1]
    if case.what != "limit":
        repair(disk)
    found["resumed"] = survival.forked(resume, log)
    return found


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue


def make_read_only(disk: Path) -> None:
    remount("ro", disk)


def limit_files(disk: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))


BREAK: dict[str, Callable[[Path], None]] = {"fill": fill, "make read-only": make_read_only, "limit": limit_files}


def repair(disk: Path) -> None:
    remount("rw", disk)
    (disk / "ballast").unlink(missing_ok=True)


def remount(access: str, disk: Path) -> None:
    """Change only the mount (`bind`): otherwise mount(8) repeats the owner's number, which is unknown in the user namespace."""
    mount("-o", f"remount,bind,{access}", disk)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


# -- the tests ---------------------------------------------------------------------------------------------------------


def why_no_mounts(folder: Path) -> str:
    """Why this machine does not allow the mounts of these tests; empty if it does."""
    steps = ("-t tmpfs tmpfs", "-o remount,bind,ro", "-o remount,bind,rw")
    script = " && ".join(f'mount {step} "$1"' for step in steps)
    try:
        tried = subprocess.run([*OWN_MOUNTS, "sh", "-c", script, "sh", folder], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    said = tried.stderr or f"exit status {tried.returncode}"
    return said.splitlines()[0] if tried.returncode else ""


@pytest.fixture(scope="module")
def mounted(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("disks")
    if reason := why_no_mounts(folder):
        pytest.skip(f"this machine does not let this user mount a tmpfs in a user namespace: {reason}")
    return folder, survival.program("tests.end_to_end.test_full_disks", folder, "mounted", before=OWN_MOUNTS)


def check(case: Case, found: dict[str, Any], run: Path, uninterrupted: Path) -> None:
    assert found["ended"] == 1
    assert found["said"].startswith("trl_trustkl.errors.SaveError: `output_dir`"), found["said"]
    for piece in (case.failed, case.reason, "resume_from_checkpoint=True"):
        assert piece in found["said"], found["said"]
    last = 2 if "checkpoint-4" in case.failed or "update 3" in case.failed else None
    assert found["complete"] == [f"checkpoint-{last}"]
    # On a full disk a record may still fit into the last block of its file; the completions beside it then do not.
    assert found["updates"] in ((2, 3) if "record" in case.failed else (4,))
    assert found["ended again"] == 1
    assert found["said again"].startswith("trl_trustkl.errors.SaveError: `output_dir`"), found["said again"]
    assert case.reason in found["said again"]
    assert found["resumed"] == 0 and survival.same(uninterrupted, run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.what}-{case.name}-{case.number}")
def test_a_disk_that_breaks_ends_a_run_with_its_last_checkpoint_complete(mounted, case):
    folder, found = mounted
    index = CASES.index(case)
    check(case, found[index], folder / str(index) / "run", folder / "uninterrupted")


def test_a_limit_on_the_size_of_files_ends_a_run_with_its_last_checkpoint_complete(tmp_path):
    (found,) = survival.program("tests.end_to_end.test_full_disks", tmp_path, "limited")
    check(LIMIT, found, tmp_path / "0" / "run", tmp_path / "uninterrupted")


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES if sys.argv[2] == "mounted" else [LIMIT])
