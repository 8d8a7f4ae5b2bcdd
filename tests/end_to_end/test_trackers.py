"""Records in the trackers of `report_to`: the values that are read back equal those of `bounds.jsonl`."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from tests import tiny
from trl_trustkl.records import flatten, load_records

UPDATES = 2
BLOCK = 2**15  # bytes


def run(folder, tracker: str, **changes) -> list[dict]:
    """The flat records of a short run that reports to `tracker`."""
    tiny.trainer(folder, changes={"max_steps": UPDATES, "report_to": tracker, "run_name": "r", **changes}).train()
    return [flatten(record) for record in load_records(folder)]


def numbers(record: dict) -> dict[str, float]:
    """The numbers of a flat record, which trackers plot; texts, booleans and missing numbers are only in the files."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def assert_same(read: list[dict[str, float]], records: list[dict], rel: float = 0.0) -> None:
    """`read`: one dict per logged step; its keys have the prefix of transformers."""
    assert len(read) == len(records) == UPDATES
    for got, record in zip(read, records, strict=True):
        expected = numbers(record)
        assert len(expected) > 40 and {"trust/kl", "anchor/kl_exact", "trust/ratio_quantiles/0.5"} <= expected.keys()
        for key, value in expected.items():
            assert math.isclose(got[f"train/{key}"], value, rel_tol=rel, abs_tol=0.0), key
        assert math.isclose(got["train/objective/kl"], record["anchor/kl"], rel_tol=rel)
        assert not any(isinstance(got.get(f"train/{key}"), str) for key in record)


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    records = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"scalars": 0})
    events.Reload()
    read: list[dict[str, float]] = [{} for _ in range(UPDATES)]
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if tag.startswith("train/"):
                read[event.step - 1][tag] = event.value
    assert_same(read, records, rel=1e-6)  # single precision


@pytest.mark.slow  # the import of wandb and its service take longer than the other tests
def test_wandb_offline(tmp_path, monkeypatch):
    """The values are read from the log file of an offline run."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        records = run(tmp_path, "wandb")
    finally:
        wandb.finish()
    read = [
        row for row in offline_history(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))) if "train/trust/kl" in row
    ]
    assert_same(read, records)


def offline_history(file: Path) -> list[dict]:
    """The history rows of wandb's log: protobufs, framed as in a LevelDB log after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, payload, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete payload, or the end of one
            record = wandb_internal_pb2.Record.FromString(payload)
            items, payload = record.history.item, b""
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_trackio_local(tmp_path, monkeypatch):
    """The values are read from trackio's local database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before the import, which reads it
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    records = run(tmp_path, "trackio", project="tiny")
    (name,) = SQLiteStorage.get_runs("tiny")
    read = [row for row in SQLiteStorage.get_logs("tiny", name) if "train/trust/kl" in row]
    assert_same(read, records)
