"""Generated records of runs: bad ones are rejected with an error of this package, and changed files are read or rejected."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import typing
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.end_to_end.fuzzing import check_rejected, is_json, text
from tests.example_runs import completions_of, rows_of, write_run
from trl_trustkl import load_records
from trl_trustkl.errors import DataError, TrustKLError
from trl_trustkl.records import BoundRecord
from trl_trustkl.report import read_run, write_report
from trl_trustkl.report.findings import FINDINGS

pytestmark = pytest.mark.filterwarnings("ignore")

RECORD = json.loads(json.dumps(rows_of(1)[0]))


def places(schema: Any = BoundRecord, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The path and type of every key of a record, nested ones included."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, hint in typing.get_type_hints(schema).items():
        found.append(((*path, name), hint))
        if hasattr(hint, "_fields"):
            found += places(hint, (*path, name))
    return found


def misfit(hint: Any) -> st.SearchStrategy[Any]:
    """JSON that is not of this type. (null stands for a number that is not finite, so it is valid for a number.)"""
    optional, parts = type(None) in typing.get_args(hint), set(typing.get_args(hint)) or {hint}
    other = st.lists(st.integers(), max_size=2) if optional else st.lists(st.integers(), max_size=2) | st.just(MISSING)
    if hasattr(hint, "_fields"):  # unknown keys are ignored, so that any object may be valid
        return st.one_of(other, text, st.integers(), st.booleans(), st.none())
    if hint == dict[str, float]:
        return st.one_of(other, text, st.integers(), st.booleans(), st.none(), st.just({"0.5": "much"}))
    if any(typing.get_origin(part) is dict for part in parts):
        return st.one_of(other, text, st.integers(), st.booleans(), st.just({"0.5": "much"}))
    if bool in parts:
        null = st.nothing() if optional else st.none()
        return st.one_of(other, text, st.integers(), null, st.just({}))
    if str in parts:
        return st.one_of(other, st.integers(), st.booleans(), st.floats(0, 1), st.just({}))
    if int in parts:
        return st.one_of(
            other, text, st.booleans(), st.none(), st.floats(0, 9), st.integers(max_value=-1), st.just(2**60)
        )
    return st.one_of(other, text, st.booleans(), st.just({}), st.just(10**400))


MISSING = object()
PLACES = places()
bad_key = st.sampled_from(PLACES).flatmap(lambda place: st.tuples(st.just(place[0]), misfit(place[1])))
bad_line = st.one_of(
    text.filter(lambda t: t.strip() and not is_json(t) and "\n" not in t and "\r" not in t),
    st.sampled_from(
        ["[]", "1", "null", '"text"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"update": 1', "NaN", "{]"]
    ),
)


def with_value(path: tuple[str, ...], value: Any) -> str:
    row = copy.deepcopy(RECORD)
    place = row
    for step in path[:-1]:
        place = place[step]
    if value is MISSING:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = value
    return json.dumps(row)


def test_invalid_records_are_rejected(record_property, tmp_path):
    folder = write_run(tmp_path, rows_of(4))
    first, *others = (folder / "bounds.jsonl").read_bytes().splitlines(keepends=True)

    def read(line: str) -> None:
        (folder / "bounds.jsonl").write_bytes(first + line.encode("utf-8", "surrogatepass") + b"\n" + b"".join(others))
        read_run(folder)

    rejected = len(check_rejected(bad_key, lambda pair: read(with_value(*pair)), DataError, 300))
    rejected += len(check_rejected(bad_line, read, DataError, 60))
    record_property("rejected", rejected)


def mutated(content: bytes, seed: int) -> bytes:
    """The file with a few bytes or pieces changed, lost, doubled or moved."""
    chance, result = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 2)):
        at, length = chance.randrange(len(result)), chance.randint(1, 40)
        piece = result[at : at + length]
        change = chance.choice(["flip", "lose", "double", "move", "replace", "end"])
        if change == "flip":
            result[at] ^= 1 << chance.randrange(8)
        elif change == "lose":
            del result[at : at + length]
        elif change == "double":
            result[at:at] = piece
        elif change == "move":
            del result[at : at + length]
            place = chance.randrange(len(result))
            result[place:place] = piece
        elif change == "replace":
            result[at : at + 1] = chance.choice(
                [b"NaN", b"-Infinity", b"1e999", b"null", b"{}", b"\x00", b"\xff", b"\n", b'"']
            )
        else:
            del result[at:]
            result += b"\n" if not result else b""
    return bytes(result)


def read_mutated(folder: Any, seed: int) -> Any:
    rows = rows_of(4)
    write_run(folder, rows, completions_of(rows))
    file = folder / ("completions.jsonl" if seed % 4 == 0 else "bounds.jsonl")
    file.write_bytes(mutated(file.read_bytes(), seed))
    with contextlib.suppress(TrustKLError):
        load_records(folder)
    try:
        return read_run(folder)
    except TrustKLError:
        return None


def test_a_file_with_changed_bytes_is_read_or_rejected(tmp_path):
    read = 0
    for seed in range(400):
        if (run := read_mutated(tmp_path, seed)) is not None:
            read += 1
            for finding in FINDINGS.values():
                finding(run)
    assert 20 < read < 380, "almost all of the changes are harmless, or almost all are fatal"


@pytest.mark.slow
def test_a_report_is_rendered_if_a_file_with_changed_bytes_can_be_read(tmp_path):
    runs = [read_mutated(tmp_path / str(seed), seed) for seed in range(400)]
    for run in [run for run in runs if run is not None][:30]:
        assert write_report([run]).stat().st_size > 1000


def test_a_path_without_records_is_rejected(tmp_path):
    (tmp_path / "bounds.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nul\0", "", tmp_path / "bounds.jsonl"):
        for reader in (load_records, read_run):
            with pytest.raises(DataError):
                reader(path)
