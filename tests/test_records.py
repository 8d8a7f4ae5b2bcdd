"""Records as dicts, as flat keys and as lines of a file that is appended to, cut and read back."""

from __future__ import annotations

import json
import math

import pytest

from tests.example_runs import record, rows_of, write_run
from trl_trustkl.errors import DataError, SaveError
from trl_trustkl.records import (
    BoundRecord,
    append_line,
    as_dict,
    cut,
    flatten,
    load_records,
    move_aside,
    numbered_rows,
    take_over,
    written,
)


def test_a_record_is_plain_dicts_without_numbers_that_are_not_finite():
    made = record(score=math.nan, trust=record().trust._replace(kl=math.inf, ratio_quantiles={"0.5": -math.inf}))
    plain = as_dict(made)
    assert (
        plain["score"] is None and plain["trust"]["kl"] is None and plain["trust"]["ratio_quantiles"] == {"0.5": None}
    )
    assert plain["anchor"]["coef"] == 0.05 and plain["update"] == 1 and plain["trust"]["stopped"] is False
    assert list(plain) == list(BoundRecord._fields)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_flat_keys_have_the_path_to_their_value():
    flat = flatten(record(seconds={"total": 1.5}))
    assert flat["update"] == 1 and flat["anchor/kl_exact"] == 5.6 and flat["seconds/total"] == 1.5
    assert flat["trust/ratio_quantiles/0.5"] == 1.0 and flat["trust/limit"] is None
    assert not any(isinstance(value, dict) for value in flat.values())
    assert flatten(as_dict(record(seconds={"total": 1.5}))) == flat


def test_lines_are_appended_and_read_back(tmp_path):
    rows = [as_dict(record(update, refused="zu groß" if update == 2 else None)) for update in (1, 2)]
    for row in rows:
        append_line(tmp_path / "bounds.jsonl", row)
    assert load_records(tmp_path) == load_records(tmp_path / "bounds.jsonl") == rows
    assert "zu groß" in (tmp_path / "bounds.jsonl").read_text("utf-8"), "text was escaped"


def test_a_line_that_cannot_be_appended_is_an_error_with_its_update(tmp_path):
    with pytest.raises(SaveError, match="the record of update 7 could not be appended to"):
        append_line(tmp_path / "nowhere" / "bounds.jsonl", {"update": 7})
    with pytest.raises(SaveError, match=r"^`output_dir`: inner \(full\)"), written("outer"), written("inner"):
        raise OSError("full")


def test_rows_are_numbered_and_a_line_that_was_cut_short_is_none(tmp_path):
    file = tmp_path / "bounds.jsonl"
    file.write_text('{"update": 1}\n\n{"update": 2}\n{"upda')
    assert list(numbered_rows(file)) == [(1, {"update": 1}), (3, {"update": 2}), (4, None)]
    assert load_records(file) == [{"update": 1}, {"update": 2}]
    file.write_text('{"upda\n{"update": 2}\n')
    with pytest.raises(DataError, match=r"bounds.jsonl, line 1: not a JSON record"):
        load_records(file)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match="must be a JSON object, got list"):
        load_records(file)


def test_later_updates_and_unreadable_lines_are_cut(tmp_path):
    file = write_run(tmp_path, rows_of(5)) / "bounds.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write('"no record"\n{"update": 2')
    cut(file, after=3)
    assert [row["update"] for row in load_records(file)] == [1, 2, 3]
    cut(tmp_path / "nowhere.jsonl", after=3)
    assert [path.name for path in tmp_path.iterdir()] == ["bounds.jsonl"], "a temporary file was left"


def test_a_file_moves_aside_to_the_first_free_number(tmp_path):
    file = tmp_path / "bounds.jsonl"
    move_aside(file)
    assert not list(tmp_path.iterdir())
    for number in (1, 2):
        file.write_text(str(number))
        move_aside(file)
        assert (tmp_path / f"bounds.jsonl.{number}").read_text() == str(number) and not file.exists()
    assert (tmp_path / "bounds.jsonl.1").read_text() == "1"


def test_the_records_of_another_folder_are_taken_over(tmp_path):
    old, new = write_run(tmp_path / "old", rows_of(2)), write_run(tmp_path / "new", rows_of(1), [{"update": 1}])
    take_over(old, old)
    take_over(old, new)
    assert load_records(new) == load_records(old) == rows_of(2)
    assert {path.name for path in new.iterdir()} == {"bounds.jsonl", "bounds.jsonl.1", "completions.jsonl.1"}


def test_half_of_an_emoji_is_written_as_an_escape(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text in ("\ud83d", "\U0001f600"):
        append_line(file, {"update": 1, "text": text})
    assert [row["text"] for _, row in numbered_rows(file)] == ["\ud83d", "\U0001f600"]
    assert file.read_bytes().splitlines()[1].decode() == '{"update": 1, "text": "\U0001f600"}'
