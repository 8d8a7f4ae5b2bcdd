"""Two processes with FSDP2 or ZeRO of which one fails, gets a signal or is killed at any moment: both end, and the run is
resumed bit for bit.

The tests start this file as a program, once for each engine; it forks the processes.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import sharded, survival
from tests.end_to_end.test_failures_in_two_processes import ACTS, last_line
from tests.survival import pair

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes, pytest.mark.slow]
KILLS, SEED = 10, 20261127
SLOWEST = 60.0
"""Seconds in which both processes must have ended; a process that waits for another one ends after half an hour."""


class Case(NamedTuple):
    """What happens to one of the processes before a moment of its run."""

    what: str
    rank: int
    moment: survival.Moment
    said: str = ""


CASES = [
    Case("fail", 1, ("score", 2), "RewardError: reward function `fails_on_request`"),
    Case("run out of memory", 1, ("step", 9)),
    Case("terminate", 1, ("measure", 2)),
    Case("limit files", 0, ("write", 1), "checkpoint-4 could not be written"),
    Case("kill", 0, ("save_file", 3)),
]


def build(run: Path) -> Any:
    return survival.build(run, use_cpu=False)


def train(run: Path, *, resume: bool = False) -> None:
    trainer = build(run)
    with survival.counted(trainer, -1, survival.kill) as seen:
        trainer.train(resume_from_checkpoint=resume)
    run.with_name(f"{run.name}-moments-{trainer.accelerator.process_index}").write_text(json.dumps(seen))


def meet(case: Case, run: Path) -> None:
    """Train until the moment of the case, then act on its process."""
    trainer = build(run)
    mine = trainer.accelerator.process_index == case.rank
    survival.cut_off(trainer, case.moment if mine else -1, lambda name: ACTS[case.what](trainer))


def main(folder: Path, engine: str) -> None:
    """For each case: train in two processes, interrupt one of them, and resume the run. Prints a line of JSON for each."""
    survival.quieten()
    sharded.on_cpus(engine)
    assert pair(folder / "uninterrupted", folder / "uninterrupted-log", train) == [0, 0]
    draw = random.Random(SEED)
    cases = list(CASES)
    for rank in [draw.randrange(2) for _ in range(KILLS)]:
        moments = json.loads((folder / f"uninterrupted-moments-{rank}").read_text())
        cases.append(Case("kill", rank, draw.randrange(len(moments))))
    for index, case in enumerate(cases):
        run, log = folder / str(index), folder / f"{index}-log"
        started = time.monotonic()
        found: dict[str, Any] = {"case": case._asdict(), "ended": pair(run, log, partial(meet, case))}
        found["seconds"] = time.monotonic() - started
        found["said"] = [last_line(log.with_name(f"{log.name}-{rank}")) for rank in range(2)]
        found["resumed"] = pair(run, log, partial(train, resume=True))
        found["same"] = survival.same(folder / "uninterrupted", run)
        print(json.dumps(found), flush=True)


@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_both_processes_end_and_the_run_is_resumed_bit_for_bit(tmp_path, engine):
    sharded.require(engine)
    found = survival.program("tests.end_to_end.test_sharded_failures", tmp_path, engine)
    assert len(found) == len(CASES) + KILLS
    for each in found:
        case = Case(**each["case"])
        print(case, each["ended"], f"{each['seconds']:.1f} s")
        wanted = {"kill": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM}.get(case.what, 1)
        assert each["ended"][case.rank] == wanted, case
        assert None not in each["ended"] and each["seconds"] < SLOWEST, case
        assert case.said in each["said"][1 - case.rank], case
        assert each["resumed"] == [0, 0] and each["same"], case


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
