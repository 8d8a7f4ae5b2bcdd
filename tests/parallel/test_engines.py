"""Which engine shards a run, and which weights it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

from tests import sharded, tiny
from trl_trustkl.parallel.engines import build_sharding, load_everywhere
from trl_trustkl.parallel.sharding import REPLICATED


def test_one_process_has_complete_parameters(tmp_path: Path) -> None:
    assert build_sharding(Accelerator(cpu=True), saves=True) is REPLICATED
    assert tiny.trainer(tmp_path).parts.sharding.sharded is False


def test_a_model_that_every_process_loads_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2, device="meta")
    load_everywhere(layer)
    for name, value in sharded.FSDP2.items():
        monkeypatch.setenv(name, value)
    load_everywhere(layer)  # one process: there is nobody to ask
    load_everywhere(lambda: None)
    assert layer.weight.is_meta
