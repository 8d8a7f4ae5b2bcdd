"""Files that are replaced in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trl_trustkl.errors import ConfigError
from trl_trustkl.files import create_folder, replacing, write_atomically


def test_a_folder_is_created_once(tmp_path: Path) -> None:
    for _ in range(2):
        create_folder("output_dir", str(tmp_path / "a" / "b"))
        assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("name", "why"),
    [("", "No such file"), ("file", "File exists"), ("file/run", "Not a directory"), ("a\0b", "null byte")],
)
def test_a_folder_that_cannot_be_created_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=f"`output_dir` got .*; it must be a folder, or one .*{why}"):
        create_folder("output_dir", name)


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.raises(ConfigError, match="It is not writable"):
        create_folder("output_dir", str(tmp_path))


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "page.html"
    write_atomically(path, "π")
    with pytest.raises(KeyboardInterrupt), replacing(path, durable=durable) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == "π".encode() and os.listdir(tmp_path) == ["page.html"]
    with replacing(path, durable=durable) as file:
        file.write(b"complete")
        assert path.read_bytes() == "π".encode()
    assert path.read_bytes() == b"complete" and os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("durable", [False, True])
def test_only_a_durable_file_is_synchronised_with_its_folder_before_and_after_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path, seen = tmp_path / "records.jsonl", []
    fsync, replace = os.fsync, os.replace

    def watched(descriptor: int) -> None:
        seen.append("file" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "folder")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda *args: (seen.append("replace"), replace(*args)))
    with replacing(path, durable=durable) as file:
        file.write(b"1")
    assert seen == (["file", "replace", "folder"] if durable else ["replace"])
