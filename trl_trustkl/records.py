"""Records of updates as JSON lines: written as they come, read back whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, SaveError
from .files import replacing
from .types import BoundRecord

BOUNDS_FILE = "bounds.jsonl"
COMPLETIONS_FILE = "completions.jsonl"


def as_dict(record: Any) -> Any:
    """A record as plain dicts; a number that is not finite becomes None, since JSON has none of them."""
    if hasattr(record, "_asdict"):
        return {key: as_dict(value) for key, value in record._asdict().items()}
    if isinstance(record, dict):
        return {key: as_dict(value) for key, value in record.items()}
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record


def flatten(record: BoundRecord | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, with keys such as `trust/kl`."""
    plain = as_dict(record)
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one line and hand it to the operating system before returning: a killed run keeps every finished update.

    Raises SaveError where that fails, on a full disk for example.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    failure = f"the record of update {row.get('update')} could not be appended to {path}"
    with written(failure), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def written(failure: str) -> Iterator[None]:
    """SaveError in place of an OSError inside; `failure` says what could not be done."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"`output_dir`: {failure} ({error}). Make room or mend the folder, then train(resume_from_checkpoint=True)."
        ) from error


def cut(path: Path, *, after: int) -> None:
    """Drop the lines of later updates, and a last line cut short, for a run that goes on `after` an update.

    The file is replaced in one step: a kill leaves the old one or the new one.
    """
    if not path.exists():
        return
    with open(path, "rb") as old, replacing(path, durable=True) as new:
        new.writelines(line for line in old if _update_of(line) <= after)


def take_over(source: Path, folder: Path) -> None:
    """Copy the records of the run in `source`, for one that goes on in another `folder`; older files there move aside."""
    if source.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (BOUNDS_FILE, COMPLETIONS_FILE):
        move_aside(folder / name)
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _update_of(line: bytes) -> float:
    """Which update a line is of; infinity for one that is no record."""
    try:
        return float(json.loads(line)["update"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def move_aside(path: Path) -> Path | None:
    """Rename a file left by an earlier run to the first free `name.1`, `name.2`, …; returns where it went."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, target)
    return target


def load_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, one dict an update, from its folder or its `bounds.jsonl`.

    Raises DataError for a missing file or a line that is not a JSON object; a last line cut short by a kill is left out.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     append_line(Path(run) / "bounds.jsonl", {"update": 1, "binding": "clip"})
    ...     load_records(run)
    [{'update': 1, 'binding': 'clip'}]
    """
    file = Path(path)
    file = file / BOUNDS_FILE if file.is_dir() else file
    return [row for _, row in numbered_rows(file) if row is not None]


def numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The rows of a file with their line numbers, one at a time; None for a last line that a kill cut short.

    Raises DataError as `load_records` does.
    """
    if not file.exists():
        raise DataError(f"no records at {file}; give a run's output_dir, or its {BOUNDS_FILE}.")
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _row(line, f"{file}, line {number}")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None


def _row(line: bytes, where: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None
        raise DataError(f"{where}: not a JSON record ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, got {type(row).__name__}.")
    return row
