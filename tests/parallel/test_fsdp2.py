"""FSDP2's shards are read, written, gathered, clipped and stepped as complete tensors would be."""

from __future__ import annotations

from typing import Any

import pytest

from tests import shards

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return shards.answers(tmp_path_factory.mktemp("two"), "fsdp2")


@pytest.mark.parametrize("what", shards.ANSWERS)
def test_shards_are_read_written_and_gathered(said: list[dict[str, Any]], what: str) -> None:
    assert [each[what] for each in said] == [True, True]


def test_each_process_has_a_part_of_each_parameter(said: list[dict[str, Any]]) -> None:
    for name, weight in shards.values(shards.trained_model()).items():
        parts = [each["local"][name] for each in said]
        assert parts[0] + parts[1] == weight.tolist(), name
        assert len(parts[0]) == -(-len(weight) // 2)


def test_a_tensor_that_is_not_like_the_parameter_is_no_part_of_it(said: list[dict[str, Any]]) -> None:
    assert [each["unlike"] for each in said] == [3.0, 3.0]


def test_gradients_and_steps_are_those_of_complete_parameters(said: list[dict[str, Any]]) -> None:
    shards.check_steps(said)


def test_losses_are_not_rounded_to_the_dtype_of_mixed_precision(said: list[dict[str, Any]]) -> None:
    assert [each["dtype"] for each in said] == ["torch.float32", "torch.float32"]
