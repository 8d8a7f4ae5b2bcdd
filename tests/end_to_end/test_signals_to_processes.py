"""Signals sent to real processes in each phase of an update: exit statuses, times to exit, records and resuming.

The tests start this file as a program, once for all cases; it forks the processes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import survival
from tests.survival import PATIENCE
from trl_trustkl import load_records
from trl_trustkl.run import checkpoint_folder as checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]


class Case(NamedTuple):
    """Signals that reach a run in the `number`-th call of a function, how it ends then, and after how many updates."""

    name: str
    number: int
    signals: tuple[signal.Signals, ...]
    status: int
    updates: int
    grace_seconds: float = 20.0


TERM, INT = signal.SIGTERM, signal.SIGINT
MOMENTS = {  # with the last update of the interrupted run: the current one, or the one that is being saved
    ("rollout", 2): 3,
    ("score", 2): 3,
    ("optimise", 2): 3,
    ("step", 9): 3,
    ("measure", 2): 3,
    ("write", 0): 2,
    ("save_file", 1): 2,
    ("fsync", 5): 2,
}
CASES = [
    *(Case(*moment, (TERM,), 143, updates) for moment, updates in MOMENTS.items()),
    *(
        Case(*moment, (INT,), 130, updates)
        for moment, updates in MOMENTS.items()
        if moment[0] in ("score", "measure", "save_file")
    ),
    Case("rollout", 2, (TERM,), 143, 2, grace_seconds=0.0),
    Case("step", 9, (INT,), 130, 2, grace_seconds=0.0),
    Case("score", 2, (TERM,), 143, 2, grace_seconds=0.1),
    # Where KeyboardInterrupt is not caught, Python ends the process by SIGINT: 130 in a shell.
    Case("step", 9, (TERM, TERM), -INT, 2),
    Case("save_file", 3, (INT, INT), -INT, 4),
]


# -- the program that the tests start ----------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """For each case: send its signals to a run, then resume it. Prints a line of JSON for each."""
    survival.load_all(folder)
    assert survival.forked(lambda: survival.train(folder / "uninterrupted"), folder / "log") == 0
    for index, case in enumerate(CASES):
        run = folder / str(index)
        ended, seconds = signalled(run, case, folder / "log")
        left = [len(load_records(run)), checkpoint.newest_complete(run).name]
        resumed = survival.forked(lambda run=run: survival.train(run, resume=True), folder / "log")
        print(json.dumps({"ended": ended, "seconds": seconds, "left": left, "resumed": resumed}), flush=True)


def signalled(run: Path, case: Case, log: Path) -> tuple[int | None, float]:
    """Train in a child that reports when it has reached the case's moment, and send it each signal in turn.

    Returns its exit status, and the seconds from the last signal to its end.
    """
    heard, said = os.pipe()

    def job() -> None:
        trainer = survival.build(run, grace_seconds=case.grace_seconds)
        survival.cut_off(
            trainer, (case.name, case.number), lambda name: wait_for_signals(trainer, said, len(case.signals))
        )

    child = survival.fork(job, log)
    for number in case.signals:
        if select.select([heard], [], [], PATIENCE)[0]:
            os.read(heard, 1)
            os.kill(child, number)
    started = time.monotonic()
    ended = survival.end_of(child, PATIENCE)
    os.close(heard)
    os.close(said)
    return ended, time.monotonic() - started


def wait_for_signals(trainer: Any, said: int, count: int) -> None:
    os.write(said, b".")
    trainer.parts.stop.wait(PATIENCE)
    if trainer.args.grace_seconds < 1:
        time.sleep(2 * trainer.args.grace_seconds)  # the function takes longer than the grace period
    if count > 1:
        os.write(said, b".")
        time.sleep(PATIENCE)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> Callable[[Case], tuple[dict[str, Any], Path, Path]]:
    folder = tmp_path_factory.mktemp("signals")
    found = survival.program("tests.end_to_end.test_signals_to_processes", folder)
    assert len(found) == len(CASES)
    return lambda case: (found[CASES.index(case)], folder / str(CASES.index(case)), folder / "uninterrupted")


def described(case: Case) -> str:
    return "-".join([case.name, *(number.name for number in case.signals), f"{case.grace_seconds:g}s"])


@pytest.mark.parametrize("case", CASES, ids=described)
def test_a_signal_ends_a_process_in_time_and_it_is_resumed_bit_for_bit(ends, case):
    end, run, uninterrupted = ends(case)
    assert end["ended"] == case.status
    assert end["seconds"] < 20.0
    assert end["left"][0] == case.updates
    assert end["resumed"] == 0 and survival.same(uninterrupted, run)
    assert not list(run.glob(".unfinished*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
