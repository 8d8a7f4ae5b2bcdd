"""ZeRO's parts are read, written, gathered, clipped and stepped as complete tensors would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import shards, tiny
from trl_trustkl.parallel.zero import complete_model

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'trl-trustkl[deepspeed]'")
pytestmark = pytest.mark.processes
STAGES = ["zero2", "zero3"]


@pytest.fixture(scope="module")
def said_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return {stage: shards.answers(tmp_path_factory.mktemp(stage), stage) for stage in STAGES}


@pytest.fixture
def said(said_by: dict[str, list[dict[str, Any]]], stage: str) -> list[dict[str, Any]]:
    return said_by[stage]


@pytest.mark.parametrize("what", shards.ANSWERS)
@pytest.mark.parametrize("stage", STAGES)
def test_parts_are_read_written_and_gathered(said: list[dict[str, Any]], stage: str, what: str) -> None:
    assert [each[what] for each in said] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_each_trained_element_is_on_one_process(said: list[dict[str, Any]], stage: str) -> None:
    for name, weight in shards.trained_model().named_parameters():
        if weight.requires_grad:
            parts = [torch.tensor(each["local"][name]) for each in said]
            assert torch.equal(torch.cat(parts), weight.detach().flatten()), name
    sizes = [sum(torch.tensor(p).numel() for p in each["local"].values()) for each in said]
    assert min(sizes) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_tensor_that_is_not_like_the_parameter_is_no_part_of_it(said: list[dict[str, Any]], stage: str) -> None:
    assert [each["unlike"] for each in said] == [3.0, 3.0]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_steps_are_those_of_complete_parameters(said: list[dict[str, Any]], stage: str) -> None:
    shards.check_steps(said)


def test_a_model_with_complete_weights_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    before = {name: id(p) for name, p in model.named_parameters()}
    complete_model(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
