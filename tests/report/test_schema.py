"""Reading records and completions of any origin: repairs, notes and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.example_runs import HEALTHY, SAMPLE_KEYS, rows_of, run_folder, write_run
from trl_trustkl.errors import DataError
from trl_trustkl.report import read_run, render_report


def with_line(folder: Path, line: bytes, file: str = "bounds.jsonl") -> Path:
    """A run with `line` as the third line of `file`."""
    write_run(folder, rows_of(4), [SAMPLE_KEYS] * 4)
    lines = (folder / file).read_bytes().splitlines(keepends=True)
    (folder / file).write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    return folder


def changed(key: str, value: Any) -> bytes:
    (row,) = rows_of(1, **{key.replace(".", "__"): value})
    return json.dumps(row).encode() + b"\n"


def without(key: str) -> bytes:
    row = json.loads(json.dumps(HEALTHY))
    *path, last = key.split(".")
    place = row
    for step in path:
        place = place[step]
    del place[last]
    return json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{broken\n", "not a JSON record"),
        (b"[1, 2]\n", "must be a JSON object, got list"),
        (b"\xff\xfe\x00\n", "not a JSON record ('utf-8' codec"),
        (without("trust.kl"), "the key `trust.kl` is missing; expected a number"),
        (without("anchor"), "the key `anchor` is missing; expected an object"),
        (changed("trust.kl", "0.1"), "`trust.kl` must be a number, got '0.1'"),
        (changed("trust.kl", True), "`trust.kl` must be a number, got True"),
        (changed("trust.kl", 10**400), "`trust.kl` must be a number below 1e308, got an integer of more than 20"),
        (changed("trust", [1]), "`trust` must be an object with rule, low"),
        (changed("anchor", None), "`anchor` must be an object with estimator, placement"),
        (changed("trust.certificate", 1.5), "`trust.certificate` must be an object with gain, stderr"),
        (
            changed("trust.certificate", {"gain": 1.5}),
            "the key `trust.certificate.stderr` is missing; expected a number",
        ),
        (changed("trust.ratio_quantiles", {"0.5": "x"}), "`trust.ratio_quantiles.'0.5'` must be a number, got 'x'"),
        (changed("trust.stopped", "no"), "`trust.stopped` must be true or false, got 'no'"),
        (changed("update", 1.5), "`update` must be an integer >= 0, got 1.5"),
        (changed("update", 10**30), "`update` must be an integer >= 0"),
        (changed("binding", {"a": 1}), "`binding` must be text, got an object of 1"),
        (changed("binding", None), "`binding` must be text, got None"),
        (changed("refused", 3), "`refused` must be text, got 3"),
        (changed("trust.rule", "\x1b[31m" * 10**6)[:-2] + b"\n", "not a JSON record"),
        (b'{"update": "' + b"x" * 10_000_000 + b'"}\n', "`update` must be an integer >= 0, got 'xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_line_is_named_with_what_was_expected(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(DataError) as raised:
        read_run(with_line(tmp_path, line))
    message = str(raised.value)
    assert f"{tmp_path / 'bounds.jsonl'}, line 3: " in message and said in message
    assert len(message) < 600 and "\x1b" not in message


def test_nesting_without_end_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nested too deeply|not a JSON record"):
        read_run(with_line(tmp_path, b'{"a":' + b"[" * 1_000_000 + b"\n"))


def test_a_broken_completion_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"completions.jsonl, line 3: the key `completion` is missing; expected text"):
        read_run(with_line(tmp_path, b'{"update": 1, "prompt": "p"}\n', "completions.jsonl"))


def test_a_truncated_last_line_is_left_out_and_noted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    content = (folder / "bounds.jsonl").read_bytes()
    (folder / "bounds.jsonl").write_bytes(content[:-100])
    run = read_run(folder)
    assert len(run.records) == 11
    assert run.notes == ["bounds.jsonl: the last line, 12, is cut short and was left out."]


def test_numbers_that_are_not_finite_are_missing_and_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rows_of(4, trust__kl=float("inf"), score=float("nan")))
    run = read_run(folder)
    assert np.isnan(run.records[0].trust.kl) and run.records[0].score is None
    assert (
        len(run.notes) == 2 and "`score` is not finite (NaN or Infinity) in 4 line(s), first in line 1" in run.notes[0]
    )
    assert render_report(folder).exists()


def test_unknown_keys_blank_lines_and_optional_keys_are_no_error(tmp_path: Path) -> None:
    rows = rows_of(3, trust__later="x", later={"deep": [1]})
    del rows[0]["trust"]["limit"]
    write_run(tmp_path, rows)
    (tmp_path / "bounds.jsonl").write_bytes(b"\n\n" + (tmp_path / "bounds.jsonl").read_bytes())
    run = read_run(tmp_path)
    assert len(run.records) == 3 and run.records[0].trust.limit is None and run.notes == [] and run.completions == []


LATER = (
    "shares",
    "rewards",
    "anchor.kl_per_token",
    "anchor.target_per_token",
    "trust.kl_response_max",
    "trust.certificate",
    "trust.mask_limit",
    "trust.masked",
    "trust.masked_responses",
    "advantage",
    "rollout",
    "sampler.ratio_min",
    "sampler.ratio_max",
    "sampler.truncated",
)
"""Keys that records of earlier versions do not have."""


def test_records_of_earlier_versions_are_readable(tmp_path: Path) -> None:
    rows = rows_of(3)
    for row in rows:
        for key in LATER:
            *path, last = key.split(".")
            (row[path[0]] if path else row).pop(last, None)
    folder = write_run(tmp_path, rows)
    record = read_run(folder).records[0]
    assert record.shares is record.rewards is record.anchor.kl_per_token is record.trust.kl_response_max is None
    assert record.advantage is record.rollout is None and record.sampler == (0.0005, None, None, None)
    assert render_report(folder).exists()


def test_a_record_out_of_order_is_sorted_and_noted(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [*rows_of(3), *rows_of(2, score=0.9)]))
    assert [record.update for record in run.records] == [1, 2, 3] and run.records[0].score == 0.9
    assert "not in order" in run.notes[0]


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records at"):
        read_run(tmp_path)
    (tmp_path / "bounds.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no finished update"):
        read_run(tmp_path)


def test_records_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = run_folder(tmp_path)
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=r"bounds.jsonl cannot be read: Permission denied"):
        read_run(folder)


def test_conversations_are_read_as_text(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"text": "ü"}]}]
    rows = [{**SAMPLE_KEYS, "prompt": talk}, {**SAMPLE_KEYS, "prompt": [{"role": "user", "content": "hello"}]}]
    run = read_run(write_run(tmp_path, rows_of(1), rows))
    assert [row.prompt for row in run.completions] == ['system: s\nuser: [{"text": "ü"}]', "hello"]


def test_the_settings_of_a_run_are_read_as_text(tmp_path: Path) -> None:
    assert read_run(run_folder(tmp_path)).settings == {}
    (tmp_path / "run_settings.json").write_text(
        '{"options": {"seed": 7, "beta": null, "names": ["a"]}, "versions": {}}'
    )
    run = read_run(tmp_path)
    assert run.settings == {"options": {"seed": "7", "beta": "None", "names": "['a']"}, "versions": {}}
    assert run.notes == []


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"options": 7}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": {"b": ' + b"9" * 5000 + b"}}",
        b'{"a": 1.5}',
        json.dumps({"options": dict.fromkeys(range(2001), 1)}).encode(),
    ],
)
def test_settings_that_cannot_be_read_are_left_out_with_a_note(tmp_path: Path, content: bytes) -> None:
    (run_folder(tmp_path) / "run_settings.json").write_bytes(content)
    run = read_run(tmp_path)
    assert (
        run.settings == {}
        and run.notes[0].startswith("run_settings.json: left out, because")
        and render_report(tmp_path)
    )
