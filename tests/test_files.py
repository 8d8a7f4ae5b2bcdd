"""Files that are replaced in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trl_trustkl.files import replacing, write_atomically


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
