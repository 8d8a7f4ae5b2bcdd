"""Records on disk: read back as they were written, and moved aside by a new run."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from tests.watched import run
from trl_trustkl import load_records
from trl_trustkl.errors import DataError
from trl_trustkl.records import as_dict

pytestmark = pytest.mark.filterwarnings("ignore")


def test_records_are_read_back_as_they_were_written(tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_record(self, args, state, control, record, completions):
            seen.append(record)

    run(tmp_path, callbacks=[Keep()])
    read = load_records(tmp_path)
    assert read == load_records(tmp_path / "bounds.jsonl") == load_records(str(tmp_path))
    assert [record["trust"] for record in read] == [as_dict(record.trust) for record in seen]
    assert [record["seconds"] for record in read] == [record.seconds for record in seen]


def test_records_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no records at .*bounds.jsonl"):
        load_records(tmp_path)
    (tmp_path / "bounds.jsonl").write_text('{"update": 1}\n{"upd')
    assert load_records(tmp_path) == [{"update": 1}]  # a last line that a kill cut short
    (tmp_path / "bounds.jsonl").write_text('{"upd\n{"update": 2}\n')
    with pytest.raises(DataError, match="line 1: not a JSON record"):
        load_records(tmp_path)


def test_a_fresh_run_moves_the_records_of_an_old_one_aside(tmp_path):
    first = run(tmp_path, changes={"max_steps": 2})[1]
    second = run(tmp_path, changes={"max_steps": 1})[1]
    third = run(tmp_path, changes={"max_steps": 1})[1]
    assert (len(first), len(second), len(third)) == (2, 1, 1)
    assert load_records(tmp_path / "bounds.jsonl.1") == first
    assert load_records(tmp_path / "bounds.jsonl.2") == second
    assert (tmp_path / "completions.jsonl.2").exists()
