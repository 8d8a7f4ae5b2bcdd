"""Collective operations: a single process does not communicate, and two get the results over the data of both.

This file is also the program that each of the two processes runs.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from tests.processes import in_two_processes, single_process
from trl_trustkl.errors import NonFiniteRewardError, RewardError, SaveError
from trl_trustkl.parallel.processes import Processes

# -- one process -------------------------------------------------------------------------------------------------------

COMMUNICATES = re.compile(
    r"(i?send|i?recv|(all_)?gather|(all_)?reduce|broadcast|scatter|all_to_all|(monitored_)?barrier)"
)


@pytest.fixture
def processes(monkeypatch):
    """A single process, in which every communication raises an error."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a single process communicated")

    names = [name for name in dir(dist) if COMMUNICATES.match(name) and callable(getattr(dist, name))]
    assert {"all_gather", "all_reduce", "all_gather_object", "broadcast_object_list", "barrier"} <= set(names)
    for name in names:
        monkeypatch.setattr(dist, name, fail)
    return single_process()


def test_one_process_is_the_first_the_main_and_the_only_one(processes):
    assert (processes.index, processes.count, processes.is_main) == (0, 1, True)
    assert processes.device == torch.device("cpu")


def test_one_process_gets_back_what_it_gives(processes):
    for rows in (torch.randn(3, 4), torch.arange(6).view(2, 3), torch.tensor([[True, False]])):
        for result in (processes.gather(rows), processes.sum(rows)):
            assert result.dtype == rows.dtype and torch.equal(result, rows)
    assert [processes.max(number) for number in (-3, 0, 2**40)] == [-3, 0, 2**40]
    assert processes.any(True) is True and processes.any(False) is False
    items = [{"a": 1}, None, "text"]
    assert processes.gather_objects(items) == items
    value = object()
    assert processes.from_main(value) is value
    processes.wait()


def test_the_moments_of_one_process_are_those_of_its_values_under_the_mask(processes):
    values, mask = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4) < 0.6
    values[~mask] = torch.nan
    counted = values[mask].tolist()
    mean, var = processes.moments(values, mask)
    assert float(mean) == pytest.approx(statistics.mean(counted), rel=1e-12)
    assert float(var) == pytest.approx(statistics.variance(counted), rel=1e-12)


def test_one_process_raises_its_own_error(processes):
    processes.raise_on_all(None)
    error = SaveError("the disk is full")
    with pytest.raises(SaveError) as raised:
        processes.raise_on_all(error)
    assert raised.value is error


# -- two processes -----------------------------------------------------------------------------------------------------


def given(rank: int) -> dict[str, Any]:
    """The data of a process. Both processes can compute it, and with it the expected result."""
    generator = torch.Generator().manual_seed(rank)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    values = torch.randn(3, 4, generator=generator, dtype=torch.float64) + 5 * rank
    return {"rows": torch.arange(6).view(3, 2) + 10 * rank, "values": values, "mask": mask, "number": [7, -2][rank]}


FAILURES: dict[str, list[Exception | None]] = {
    "none": [None, None],
    "the second": [None, RewardError("the second process's reward failed")],
    "both": [SaveError("the first process's disk is full"), RewardError("the second process's reward failed")],
    "a subclass": [None, NonFiniteRewardError("a reward is NaN")],
}


def raised(processes: Processes, error: Exception | None) -> list[str] | None:
    try:
        processes.raise_on_all(error)
    except Exception as caught:
        return [type(caught).__name__, str(caught)]
    return None


def program(folder: Path) -> None:
    processes = Processes(Accelerator(cpu=True))
    rank = processes.index
    mine = given(rank)
    mean, var = processes.moments(mine["values"], mine["mask"])
    said = {
        "count": processes.count,
        "is_main": processes.is_main,
        "rows": processes.gather(mine["rows"]).tolist(),
        "mask": processes.gather(mine["mask"]).tolist(),
        "sum": processes.sum(mine["values"]).tolist(),
        "given": mine["values"].tolist(),
        "moments": [float(mean), float(var)],
        "max": processes.max(mine["number"]),
        "any": [processes.any(rank == 0), processes.any(rank == 1), processes.any(False), processes.any(True)],
        "objects": processes.gather_objects([{"rank": rank}, *["more"] * rank]),
        "from_main": processes.from_main({"of": rank}),
        "raised": {name: raised(processes, errors[rank]) for name, errors in FAILURES.items()},
    }
    if rank == 1:
        time.sleep(0.3)
        (folder / "late").touch()
    processes.wait()
    said["waited"] = (folder / "late").exists()
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    in_two_processes("-m", "tests.parallel.test_processes", str(folder), cwd=folder)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


BOTH = [given(0), given(1)]


@pytest.mark.processes
def test_two_processes_get_the_rows_of_both_in_their_order(said):
    for each in said:
        assert each["count"] == 2
        assert each["rows"] == [row for part in BOTH for row in part["rows"].tolist()]
        assert each["mask"] == [row for part in BOTH for row in part["mask"].tolist()]
        assert each["objects"] == [{"rank": 0}, {"rank": 1}, "more"]
    assert [each["is_main"] for each in said] == [True, False]


@pytest.mark.processes
def test_two_processes_get_the_sum_and_the_moments_of_all_values(said):
    pooled = [value for part in BOTH for value in part["values"][part["mask"]].tolist()]
    total = BOTH[0]["values"] + BOTH[1]["values"]
    for rank, each in enumerate(said):
        assert each["sum"] == total.tolist()
        assert each["given"] == BOTH[rank]["values"].tolist(), "the sum overwrote the argument"
        mean, var = each["moments"]
        assert mean == pytest.approx(statistics.mean(pooled), rel=1e-12)
        assert var == pytest.approx(statistics.variance(pooled), rel=1e-12)


@pytest.mark.processes
def test_two_processes_agree(said):
    for each in said:
        assert each["max"] == 7
        assert each["any"] == [True, True, False, True]
        assert each["from_main"] == {"of": 0}
        assert each["waited"]


@pytest.mark.processes
def test_two_processes_raise_the_same_error_the_first_of_them(said):
    for each in said:
        assert each["raised"] == {
            "none": None,
            "the second": ["RewardError", "the second process's reward failed"],
            "both": ["SaveError", "the first process's disk is full"],
            "a subclass": ["NonFiniteRewardError", "a reward is NaN"],
        }


if __name__ == "__main__":
    program(Path(sys.argv[1]))
