"""Folders of checkpoints, on a disk that may fill up, and in a process that may be killed at any moment.

A checkpoint is written under another name, synced to the disk file by file, and renamed last: `checkpoint-N` is complete or
does not exist. Its manifest lists every file with size and digest, so that later damage (a partial copy, a failing disk) is
detected too. What the files contain is defined in `checkpointer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import SaveError
from ..files import UNFINISHED, sync

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
EARLIER = "earlier"

_NAME = re.compile(rf"{PREFIX}([0-9]{{1,18}})")


@contextmanager
def written_atomically(folder: Path) -> Iterator[Path]:
    """A folder to write into, which is synced to the disk and renamed to `folder` when the block ends.

    Raises SaveError if anything in the block, or the disk, fails; what was written until then is removed.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        _write_manifest(unfinished)
        for path in sorted(unfinished.rglob("*")):
            sync(path)
        sync(unfinished)
        if folder.exists():
            discard(folder)
        os.rename(unfinished, folder)
        sync(folder.parent)
    # For a full disk, safetensors and torch raise errors of their own types, and torch's message does not mention it.
    except Exception as error:
        free = _free_space(folder.parent)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveError(
            f"`output_dir`: {folder} could not be written ({type(error).__name__}: {error}){free}. The incomplete files were "
            f"removed; {_what_is_left(folder.parent)} Make room or fix the folder, then train(resume_from_checkpoint=True)."
        ) from error


def _free_space(folder: Path) -> str:
    try:
        return f", with {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free on its disk"
    except OSError:
        return ""


def _what_is_left(parent: Path) -> str:
    last = next((path for path in reversed(checkpoints(parent)) if damage(path, thorough=False) is None), None)
    return "there is no earlier checkpoint." if last is None else f"{last.name} is complete and can be resumed from."


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2), encoding="utf-8")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, complete or not, in the order of N."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (number(path), path))


def damage(folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None if it is complete; digests are compared only if `thorough`."""
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"it lacks {name}"
            if (size := path.stat().st_size) != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if thorough and _digest(path) != wanted["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_complete(output_dir: Path) -> Path | None:
    """The last complete checkpoint; a warning names each later one that is not."""
    for folder in reversed(checkpoints(output_dir)):
        if (what := damage(folder)) is None:
            return folder
        logger.warning(f"{folder} is not a complete checkpoint ({what}); it is skipped.")
    return None


def rotate(output_dir: Path, limit: int | None, *, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never the last complete one, nor the best.

    Incomplete folders are neither counted nor deleted: they may belong to others, or be needed to find out what happened.
    """
    if limit is None or limit <= 0:
        return
    complete = [folder for folder in checkpoints(output_dir) if damage(folder, thorough=False) is None]
    spared = {folder.name for folder in [*complete[-1:], *([Path(best)] if best else [])]}
    excess = len(complete) - max(limit, len(spared))
    for folder in [folder for folder in complete if folder.name not in spared][: max(excess, 0)]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interrupted deletion leaves no folder that looks like one."""
    doomed = folder.with_name(f"{UNFINISHED}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(output_dir: Path) -> None:
    """Remove unfinished folders and files of a killed run."""
    for path in output_dir.glob(f"{UNFINISHED}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_aside(output_dir: Path, *, after: int = 0) -> Path | None:
    """Move the checkpoints of an abandoned run, or those beyond update `after`, into a folder `earlier.1`, `earlier.2`, …

    Returns the folder, or None if there were no such checkpoints.
    """
    old = [folder for folder in checkpoints(output_dir) if number(folder) > after]
    if not old:
        return None
    count = 1
    while (target := output_dir / f"{EARLIER}.{count}").exists():
        count += 1
    target.mkdir()
    for folder in old:
        os.rename(folder, target / folder.name)
    logger.warning(
        f"This run does not resume from {len(old)} checkpoints in {output_dir}; they were moved to {target}."
    )
    return target


def number(folder: Path) -> int:
    """N of `checkpoint-N`."""
    return int(folder.name.removeprefix(PREFIX))


def of_update(output_dir: Path, update: int) -> Path:
    """The folder of the checkpoint after `update` updates."""
    return output_dir / f"{PREFIX}{update}"
