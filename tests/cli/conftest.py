"""The files of a small training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.training import REWARDS


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a reward model, prompts, and a file of reward functions."""
    folder = tmp_path_factory.mktemp("train")
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    for name, each in (("model", model), ("judge", tiny.scalar_model(model))):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = tiny.prompts().to_list()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder
