"""Where token ids are cached: never beside the user's own files, and not where nothing can be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset, load_from_disk

from tests import tiny
from trl_trustkl.rollout import prompts
from trl_trustkl.rollout.prompts import tokenize_prompts


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("processes", [None, 2])
def test_nothing_is_written_beside_a_saved_dataset(tmp_path, processes):
    tiny.prompts(chat=True).save_to_disk(tmp_path / "data")
    before = files(tmp_path / "data")
    dataset = load_from_disk(tmp_path / "data")
    found = tokenize_prompts(dataset, tiny.tokenizer(), name="train_dataset", num_proc=processes)
    assert files(tmp_path / "data") == before
    assert found["input_ids"] == tokenize_prompts(tiny.prompts(chat=True), tiny.tokenizer(), name="x")["input_ids"]
    assert found.column_names == ["prompt", "wanted", "input_ids"] and len(found) == 16


def test_the_cache_of_datasets_is_used_where_it_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.prompts().to_json(tmp_path / "data.jsonl")
    before = files(tmp_path)
    dataset = load_dataset(
        "json", data_files=str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    unchanged = {name: time for name, time in files(tmp_path).items() if "cache" not in Path(name).parts}
    found = tokenize_prompts(dataset, tiny.tokenizer(), name="train_dataset")
    assert all(Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in found.cache_files)
    assert {name: time for name, time in unchanged.items() if Path(name).is_file()} == {
        name: time for name, time in before.items() if Path(name).is_file()
    }
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    again = tokenize_prompts(dataset, tiny.tokenizer(pad=False), name="train_dataset")
    assert not any(Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in again.cache_files)
    assert again["input_ids"] == found["input_ids"]


def test_a_dataset_in_memory_stays_there():
    assert tokenize_prompts(Dataset.from_dict({"prompt": ["w1"]}), tiny.tokenizer(), name="x").cache_files == []
