"""What the checkpoints of a training run hold and do not hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.survival import build
from trl_trustkl import load_records
from trl_trustkl.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_only_the_model_cannot_be_resumed_from(tmp_path):
    build(tmp_path, save_only_model=True, max_steps=2).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    for wanted in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(CheckpointError, match="save_only_model=True"):
            build(tmp_path).train(resume_from_checkpoint=wanted)


def test_nothing_of_a_checkpoint_is_unpickled(run_copy, monkeypatch):
    original = torch.load

    loaded = []

    def careful(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        assert kwargs.get("weights_only") is True
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", careful)
    (run_copy / "checkpoint-6" / "training_args.bin").write_bytes(b"a pickle that is never read")
    manifest = json.loads((run_copy / "checkpoint-6" / "manifest.json").read_text())
    del manifest["files"]["training_args.bin"]
    (run_copy / "checkpoint-6" / "manifest.json").write_text(json.dumps(manifest))
    build(run_copy).train(resume_from_checkpoint=True)
    assert loaded


def test_saved_files_hold_no_hub_token(tmp_path):
    build(tmp_path, hub_token="hf_secret", max_steps=2).train()
    texts = [path.read_text() for path in (tmp_path / "checkpoint-2").glob("*.json")]
    assert texts and not any("hf_secret" in text for text in texts)


def test_a_checkpoint_may_be_renamed(run_copy):
    (run_copy / "checkpoint-4").rename(run_copy / "best")
    trainer = build(run_copy)
    trainer.train(resume_from_checkpoint=run_copy / "best")
    assert trainer.state.global_step == 6 and (run_copy / "checkpoint-2").is_dir() and (run_copy / "best").is_dir()
    assert len(load_records(run_copy)) == 6
