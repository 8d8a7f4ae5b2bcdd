"""Reading a run's records when they may come from anywhere: `types.py` is the schema, and every line is held to it.

A key that is missing or of the wrong type is an error with file, line, key and what was expected. Keys the schema does
not know are ignored: a later version may write more.
"""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from ..errors import DataError
from ..records import BOUNDS_FILE, COMPLETIONS_FILE, BoundRecord, Meaning, numbered_rows

Row = TypeVar("Row")
Reader = Callable[[Any], Any]


class Completion(NamedTuple):
    """A line of `completions.jsonl`."""

    update: Annotated[int, Meaning("The update that sampled it.")]
    prompt: Annotated[str, Meaning("Text, or a list of messages.")]
    completion: Annotated[str, Meaning("Text, or a list of messages.")]
    score: Annotated[float | None, Meaning("Its score, or `null`.", "the reward's")]
    ref_logp: Annotated[float | None, Meaning("log π_ref(completion | prompt).", "nats/response")]


class Run(NamedTuple):
    """What a report is made of. `notes` say what was mended or left out while reading."""

    name: str
    folder: Path
    records: list[BoundRecord]
    completions: list[Completion]
    notes: list[str]


class _Misfit(Exception):
    """A value that does not fit the schema; the key is completed on the way up."""

    def __init__(self, expected: str, got: object = None, key: str = "", missing: bool = False) -> None:
        self.expected, self.got, self.key, self.missing = expected, got, key, missing

    def inside(self, key: str) -> _Misfit:
        return _Misfit(self.expected, self.got, f"{key}.{self.key}" if self.key else key, self.missing)

    def __str__(self) -> str:
        if self.missing:
            return f"the key `{self.key}` is missing; expected {self.expected}"
        return f"`{self.key}` must be {self.expected}, got {_short(self.got)}"


def read_run(path: str | os.PathLike[str], *, completions: bool = True) -> Run:
    """The records of a run's folder (or of its `bounds.jsonl`), and with `completions` those, where it kept some."""
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    file = given / BOUNDS_FILE if given.is_dir() else given
    notes: list[str] = []
    records = _rows(file, BoundRecord, notes)
    if not records:
        raise DataError(f"{file} holds no finished update; let the run make one, or give another run.")
    if any(later.update <= earlier.update for earlier, later in pairwise(records)):
        notes.append(f"{file.name}: updates are not in order; sorted, the last one kept where a number occurs twice.")
        records = [record for _, record in sorted({record.update: record for record in records}.items())]
    kept = folder / COMPLETIONS_FILE
    texts = _rows(kept, Completion, notes) if completions and kept.exists() else []
    return Run(folder.resolve().name, folder, records, texts, notes)


def _rows(file: Path, schema: type[Row], notes: list[str]) -> list[Row]:
    """Every line of the file as a `schema`, in order."""
    read: Reader = _reader(schema)  # type: ignore[arg-type]  # a class is hashable; mypy doubts it for a TypeVar
    rows: list[Row] = []
    not_finite: dict[str, list[int]] = {}
    for line, raw in numbered_rows(file):
        if raw is None:
            notes.append(f"{file.name}: the last line, {line}, is cut short and was left out.")
            continue
        try:
            rows.append(read(_as_texts(raw) if schema is Completion else raw))
        except _Misfit as misfit:
            raise DataError(f"{file}, line {line}: {misfit}.") from None
        for key in _not_finite(raw):
            not_finite.setdefault(key, []).append(line)
    for key, lines in not_finite.items():
        notes.append(
            f"{file.name}: `{key}` is not finite (NaN or Infinity) in {len(lines):,} line(s), first in line {lines[0]}; "
            "read as missing."
        )
    return rows


# -- one reader for each type, made once -----------------------------------------------------------------------------


@cache
def _reader(expected: Any) -> Reader:
    """A function from JSON to `expected`: a NamedTuple, str, bool, int, float, dict[str, float], or one of them | None."""
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        (inner,) = [part for part in typing.get_args(expected) if part is not type(None)]
        return _optional(_reader(inner))
    if typing.get_origin(expected) is dict:
        return _numbers
    if hasattr(expected, "_fields"):
        return _tuple_of(expected)
    return {str: _text, bool: _boolean, int: _integer, float: _number}[expected]


def _tuple_of(schema: Any) -> Reader:
    hints = typing.get_type_hints(schema)
    fields = [(name, _reader(hints[name]), type(None) in typing.get_args(hints[name])) for name in schema._fields]
    names = ", ".join(schema._fields)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Misfit(f"an object with {names}", value)
        result = []
        for name, of_field, optional in fields:
            if name not in value and not optional:
                raise _Misfit(_EXPECTED.get(of_field, "an object"), key=name, missing=True)
            try:
                result.append(of_field(value.get(name)))
            except _Misfit as misfit:
                raise misfit.inside(name) from None
        return schema._make(result)

    return read


def _optional(of_value: Reader) -> Reader:
    def read(value: Any) -> Any:
        found = None if value is None else of_value(value)
        return None if isinstance(found, float) and math.isnan(found) else found

    return read


def _number(value: Any) -> float:
    """NaN where there is none: JSON has no other word for it than null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Misfit("a number", value)
    try:
        found = float(value)
    except OverflowError:
        raise _Misfit("a number below 1e308", value) from None
    return found if math.isfinite(found) else math.nan


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise _Misfit("an integer >= 0", value)
    return value


def _instance_of(kind: type, expected: str) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _Misfit(expected, value)
        return value

    return read


_boolean, _text = _instance_of(bool, "true or false"), _instance_of(str, "text")


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise _Misfit("an object of numbers", value)
    result = {}
    for key, entry in value.items():
        try:
            result[key] = _number(entry)
        except _Misfit as misfit:
            raise misfit.inside(_short(key)) from None
    return result


_EXPECTED: dict[Reader, str] = {
    _number: "a number",
    _integer: "an integer",
    _boolean: "true or false",
    _text: "text",
    _numbers: "an object of numbers",
}


# -- what JSON and conversations allow, and the schema does not ----------------------------------------------------------


def _not_finite(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of the numbers that are not finite: tokens such as NaN, which are not JSON but which Python reads."""
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{_short(key)[1:-1]}"
        elif isinstance(value, dict):
            yield from _not_finite(value, f"{prefix}{_short(key)[1:-1]}.")


def _as_texts(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **{key: _as_text(row[key]) for key in ("prompt", "completion") if key in row}}


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
    """The start of a value's repr; of a very long one no more than that is made."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return repr(value)
