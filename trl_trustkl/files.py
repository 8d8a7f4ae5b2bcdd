"""Folders of output, and atomic replacement of files: each is complete, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import out_of_range

UNFINISHED = ".unfinished-"
"""The names of files and folders begin with this until they are complete."""


def create_folder(option: str, folder: str) -> None:
    """Create a folder with its parents, unless it exists. ConfigError for `option` if it cannot be created or written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        why = None if os.access(folder, os.W_OK) else "It is not writable."
    except (OSError, ValueError) as error:  # ValueError: a null byte
        why = f"{getattr(error, 'strerror', None) or error}."
    if why is not None:
        raise out_of_range(option, folder, "a folder, or one that can be created", why)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends without an error. `durable`: it is synced to the disk first."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        with open(unfinished, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Sync a file or a folder to the disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
