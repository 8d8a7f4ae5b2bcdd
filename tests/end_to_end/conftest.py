"""Fixtures of several tests in this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.stock_ppo import Models, Run


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """Run TRL's PPO trainer with the responses of a script; `adapter` puts known numbers into its adapter first."""
    from tests import stock_ppo

    def go(start: Models, settings: dict | None = None, *, script=stock_ppo.SCRIPT, adapter=False, **changes) -> Run:
        monkeypatch.setattr(stock_ppo.ppo_trainer, "batch_generation", script.as_generation())
        trainer = stock_ppo.stock_trainer(tmp_path, start, settings, **changes)
        if adapter:
            stock_ppo.fill_adapter(trainer.model.policy)
        return stock_ppo.run(trainer)

    return go


@pytest.fixture
def ours(tmp_path):
    """Run this package's trainer with the responses of a script, with the same arguments."""
    from tests import stock_ppo

    def go(start: Models, settings: dict | None = None, *, script=stock_ppo.SCRIPT, adapter=False, **changes) -> Run:
        trainer = stock_ppo.our_trainer(tmp_path, start, settings, **changes)
        trainer.script = script
        if adapter:
            stock_ppo.fill_adapter(trainer.model.policy)
            trainer.reference.is_start = False  # as with TRL's trainer, the policy starts away from its reference
        return stock_ppo.run(trainer)

    return go


@pytest.fixture
def fast_stock_trainer(monkeypatch):
    """TRL's trainer without its garbage collections, which take most of its time here; tiny matrices need only one thread."""
    from tests import stock_ppo

    monkeypatch.setattr(stock_ppo.ppo_trainer, "gc", SimpleNamespace(collect=lambda: 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
