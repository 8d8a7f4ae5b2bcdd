"""Reads the records of a run, which may come from anywhere: every line is checked against the types in `records.py`.

A key that is missing or has the wrong type raises an error that names the file, the line, the key and what was expected.
Keys that the schema does not have are ignored: a later version may write more.
"""

from __future__ import annotations

import json
import math
import os
import typing
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ..errors import DataError, is_finite
from ..records import BOUNDS_FILE, COMPLETIONS_FILE, SETTINGS_FILE, BoundRecord, Meaning, numbered_rows

GROUPS = ("GRPOTrainer", "RLOOTrainer")
"""TRL's trainers that sample several completions of a prompt, without a value."""
MAX_SETTINGS = 2000  # of a run; TRL's configurations have some 200


class Completion(NamedTuple):
    """A line of `completions.jsonl`."""

    update: Annotated[int, Meaning("The update that sampled it.")]
    prompt: Annotated[str, Meaning("Text, or a list of messages.")]
    completion: Annotated[str, Meaning("Text, or a list of messages.")]
    score: Annotated[float | None, Meaning("Its score, or `null`.", "the reward's")]
    ref_logp: Annotated[float | None, Meaning("log π_ref(completion | prompt).", "nats/response")]
    rewards: Annotated[
        dict[str, float | None] | None,
        Meaning("The reward of each function by its name; `null` where it gave none.", "the reward's"),
    ] = None


Settings = dict[str, dict[str, str]]
"""Values as text, by their groups and names."""


class Run(NamedTuple):
    """What a report is made of. `notes` say what was corrected or left out while reading. `settings` are the groups of
    `run_settings.json` (model, versions, hardware, options); empty without that file."""

    name: str
    folder: Path
    records: list[BoundRecord]
    completions: list[Completion]
    notes: list[str]
    settings: Settings = {}


def read_run(path: str | os.PathLike[str], *, completions: bool = True) -> Run:
    """The records of a run's folder (or of its `bounds.jsonl`); with `completions` also the completions it recorded."""
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    file = given / BOUNDS_FILE if given.is_dir() else given
    notes: list[str] = []
    records: list[BoundRecord] = _rows(file, BoundRecord, notes)
    if not records:
        raise DataError(f"{file} holds no finished update; wait until the run has made one, or give another run.")
    # An optimizer step of GRPO or RLOO may use several generation batches, each of which has a record.
    several = records[-1].trainer in GROUPS
    if any(later.update < earlier.update + (not several) for earlier, later in pairwise(records)):
        kept = "" if several else "; of several with one number, the last was kept"
        notes.append(f"{file.name}: the updates were not in order and have been sorted{kept}.")
        last = {(record.update, index * several): record for index, record in enumerate(records)}
        records = [record for _, record in sorted(last.items())]
    rows = folder / COMPLETIONS_FILE
    texts: list[Completion] = _rows(rows, Completion, notes) if completions and rows.exists() else []
    settings = _settings(folder / SETTINGS_FILE, notes) if file.name == BOUNDS_FILE else {}  # else of an earlier run
    return Run(folder.resolve().name, folder, records, texts, notes, settings)


def _rows(file: Path, schema: Any, notes: list[str]) -> list[Any]:
    """Every line of the file as a `schema`, in order."""
    rows = []
    not_finite: dict[str, list[int]] = {}
    for line, raw in numbered_rows(file):
        if raw is None:
            notes.append(f"{file.name}: the last line, {line}, is cut short and was left out.")
            continue
        try:
            rows.append(_read(schema, _with_texts(raw) if schema is Completion else raw))
        except _Mismatch as mismatch:
            raise DataError(f"{file}, line {line}: {mismatch}.") from None
        for key in _not_finite(raw):
            not_finite.setdefault(key, []).append(line)
    for key, lines in not_finite.items():
        notes.append(
            f"{file.name}: `{key}` is not finite (NaN or Infinity) in {len(lines):,} line(s), first in line {lines[0]}; "
            "read as missing."
        )
    return rows


def _settings(file: Path, notes: list[str]) -> Settings:
    """The settings that a run wrote; empty if it wrote none, or none that can be read."""
    if not file.exists():
        return {}
    try:
        groups = json.loads(file.read_bytes())
        if (found := sum(map(len, groups.values()))) > MAX_SETTINGS:
            notes.append(f"{file.name}: left out, because it holds {found:,} settings, more than {MAX_SETTINGS:,}.")
            return {}
        return {name: {key: str(value) for key, value in group.items()} for name, group in groups.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        notes.append(f"{file.name}: left out, because it is not an object of objects ({_short(str(error))}).")
        return {}


# -- one row -----------------------------------------------------------------------------------------------------------

EXPECTED = {
    float: "a number", int: "an integer >= 0", bool: "true or false", str: "text", dict: "an object of numbers",
}  # fmt: skip


class _Mismatch(Exception):
    """A row that does not fit the schema."""


@cache
def _fields(schema: Any) -> list[tuple[str, Any, bool]]:
    """(name, type, whether it may be None) of each field; the type is a NamedTuple or a key of EXPECTED."""
    found = []
    for name, hint in typing.get_type_hints(schema).items():
        optional = type(None) in typing.get_args(hint)
        kind = typing.get_args(hint)[0] if optional else hint
        found.append((name, typing.get_origin(kind) or kind, optional))
    return found


def _read(schema: Any, row: Any, prefix: str = "") -> Any:
    """A JSON object as a `schema`; prefix: that of its keys in a message."""
    if not isinstance(row, dict):
        raise _Mismatch(f"`{prefix[:-1]}` must be an object with {', '.join(schema._fields)}, got {_short(row)}")
    values = []
    for name, kind, optional in _fields(schema):
        key = prefix + name
        if name not in row and not optional:
            raise _Mismatch(f"the key `{key}` is missing; expected {EXPECTED.get(kind, 'an object')}")
        if hasattr(kind, "_fields"):
            given = row.get(name)
            values.append(None if optional and given is None else _read(kind, given, f"{key}."))
        else:
            values.append(_value(kind, row.get(name), key, optional))
    return schema._make(values)


def _value(kind: type, value: Any, key: str, optional: bool = False) -> Any:
    """A JSON value as a `kind`; a number that is missing or not finite is NaN, or None where the field is `optional`."""
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        value = None
    if value is None and (optional or kind is float):
        return None if optional else math.nan
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and is_finite(value):
        return float(value)
    if kind is int and is_integer and 0 <= value < 2**53:
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is dict and isinstance(value, dict):
        return {name: _value(float, entry, f"{key}.{_short(name)}") for name, entry in value.items()}
    too_large = " below 1e308" if kind is float and is_integer else ""
    raise _Mismatch(f"`{key}` must be {EXPECTED[kind]}{too_large}, got {_short(value)}")


# -- what JSON and conversations allow, and the schema does not --------------------------------------------------------


def _not_finite(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of the numbers that are not finite: Python reads tokens such as NaN, which are not JSON."""
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{_short(key)[1:-1]}"
        elif isinstance(value, dict):
            yield from _not_finite(value, f"{prefix}{_short(key)[1:-1]}.")


def _with_texts(row: dict[str, Any]) -> dict[str, Any]:
    return row | {key: _as_text(row[key]) for key in ("prompt", "completion") if key in row}


def _as_text(value: Any) -> Any:
    """A conversation as text: the content of its only message, or every message after its role."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    contents = [message.get("content") for message in value]
    texts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) for content in contents]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message.get('role', '?')}: {text}" for message, text in zip(value, texts, strict=True))


def _short(value: object) -> str:
    """The start of a value's repr; only as much of it as is shown is made."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return repr(value)
