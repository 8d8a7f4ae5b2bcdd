"""Fixtures of all tests: no test needs a network, and none depends on the caller's settings."""

from __future__ import annotations

from tests import isolation

# isort: split

import json
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.utils import imports
from datasets.fingerprint import generate_random_fingerprint
from transformers.utils import logging

from tests import tiny

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Accelerate reads the metadata of a dozen packages for each trainer.
imports._is_package_available = cache(imports._is_package_available)


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def _without_garbage_collection(monkeypatch):
    """Accelerate's collection at the start of a run takes a third of the time of a short one."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)


@pytest.fixture(autouse=True)
def _without_hashes_of_datasets(monkeypatch):
    """Datasets hashes the function and arguments of each `map`; a tenth of the time of a short run."""
    monkeypatch.setattr("datasets.arrow_dataset.update_fingerprint", lambda *_: generate_random_fingerprint())


@pytest.fixture
def model_cards():
    """With this fixture, the model cards of PPO are written."""


@pytest.fixture(autouse=True)
def _without_model_cards(request, monkeypatch):
    """A card is rendered at the end of a run and for each checkpoint; a fifth of the time of a short run."""
    if "model_cards" not in request.fixturenames and (loop := sys.modules.get("trl_trustkl.ppo.loop")) is not None:
        monkeypatch.setattr(loop.TrainingLoop, "_write_card", lambda self: None)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    logging.set_verbosity_warning()  # a trainer sets `log_level` for the entire process
    with isolation.terminal():
        yield


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory) -> Path:
    """A run of six updates with checkpoints of the updates 2, 4 and 6, and the names of its moments (see survival.py)."""
    from tests import survival

    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = survival.build(folder)
    with survival.counted(trainer, -1, survival.kill) as seen:
        trainer.train()
    (folder / "moments.json").write_text(json.dumps(seen))
    return folder


@pytest.fixture
def run_copy(uninterrupted_run, tmp_path) -> Path:
    """A copy of that run's folder, for tests that write into it."""
    return Path(shutil.copytree(uninterrupted_run, tmp_path / "copy"))


def pytest_terminal_summary(terminalreporter):
    """Print how many bad inputs were generated, in this process and in the workers."""
    properties = [pair for report in terminalreporter.getreports("passed") for pair in report.user_properties]
    if rejected := sum(count for name, count in properties if name == "rejected"):
        terminalreporter.write_line(f"fuzz: {rejected:,} bad inputs, all rejected")
