"""Two processes of which one fails, gets a signal or is killed: both end, and the run is resumed bit for bit.

The tests start this file as a program, once for all cases; it forks the processes. It is also the script that
`accelerate launch` starts.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import survival
from tests.pinned import on_pinned_transformers
from tests.processes import ROOT, environment, in_two_processes
from tests.survival import PATIENCE, pair
from trl_trustkl import load_records, records
from trl_trustkl.errors import ConfigError, RewardError
from trl_trustkl.run import checkpoint_folder as checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]


class Case(NamedTuple):
    """What happens to the processes `ranks` in a function's `number`-th call, their exit statuses, and the updates recorded."""

    what: str
    ranks: tuple[int, ...]
    name: str
    number: int
    statuses: tuple[int, int]
    updates: int
    said: str = ""


KILLED = -signal.SIGKILL
CASES = [
    Case("fail", (1,), "score", 2, (1, 1), 2, "RewardError: reward function `fails_on_request`"),
    Case("fail", (0,), "score", 2, (1, 1), 2, "RewardError: reward function `fails_on_request`"),
    Case("terminate", (1,), "step", 9, (143, 143), 3),
    Case("terminate", (0,), "rollout", 2, (143, 143), 3),
    Case("terminate", (0, 1), "measure", 2, (143, 143), 3),
    Case("interrupt", (0, 1), "score", 2, (130, 130), 3),
    Case("terminate", (1,), "_save_checkpoint", 0, (143, 143), 2),
    Case("fill the records' disk", (0,), "append_line", 34, (1, 1), 2, "the record of update 3 could not be appended"),
    Case("limit files", (0,), "write", 1, (1, 1), 4, "checkpoint-4 could not be written"),
    # The other process ends with an error of gloo; the one that was killed prints nothing.
    Case("kill", (1,), "step", 9, (1, KILLED), 2),
    Case("kill", (0,), "step", 9, (KILLED, 1), 2),
    Case("kill", (0,), "save_file", 3, (KILLED, 1), 4),
]


# -- the program that the tests start ----------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """For each case: train in two processes, interrupt them, and resume the run. Prints a line of JSON for each."""
    survival.quieten()
    pair(folder / "uninterrupted", folder / "uninterrupted-log", lambda run: survival.train(run))
    for index, case in enumerate(CASES):
        run, log = folder / str(index), folder / f"{index}-log"
        started = time.monotonic()
        ended = pair(run, log, lambda run, case=case: meet(case, run))
        found = {"ended": ended, "seconds": time.monotonic() - started, "left": len(load_records(run))}
        found["said"] = [last_line(log.with_name(f"{log.name}-{rank}")) for rank in range(2)]
        found["resumed"] = pair(run, log, lambda run: survival.train(run, resume=True))
        print(json.dumps(found), flush=True)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if "Error" in line]
    return lines[-1] if lines else ""


def meet(case: Case, run: Path) -> None:
    """Train until the moment of the case, then act on its processes."""
    trainer = survival.build(run)
    mine = trainer.accelerator.process_index in case.ranks
    survival.cut_off(trainer, (case.name, case.number) if mine else -1, lambda name: ACTS[case.what](trainer))


def fail(trainer: Any) -> None:
    def fails_on_request(**_: Any) -> Any:
        raise ConnectionError("the service is down")

    trainer.parts.scorer.funcs[:] = [fails_on_request]


def fill_the_records_disk(trainer: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    records.open = full  # type: ignore[attr-defined]


def run_out_of_memory(trainer: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


ACTS = {
    "fail": fail,
    "run out of memory": run_out_of_memory,
    "terminate": lambda trainer: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda trainer: os.kill(os.getpid(), signal.SIGINT),
    "kill": lambda trainer: os.kill(os.getpid(), signal.SIGKILL),
    "fill the records' disk": fill_the_records_disk,
    "limit files": lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14)),
}


def worker(run: Path) -> None:
    """What the launcher starts: a run that waits for a signal in its third update if there is a file named `wait`."""
    survival.quieten()
    trainer = survival.build(run)
    wait = run.with_name("wait")

    def wait_for_a_signal(name: str) -> None:
        if wait.exists():
            run.with_name(f"waiting-{trainer.accelerator.process_index}").touch()
            trainer.parts.stop.wait(PATIENCE)

    with survival.counted(trainer, ("step", 9), wait_for_a_signal):
        trainer.train(resume_from_checkpoint=True)


def evaluate(folder: Path) -> None:
    """In each of two processes: evaluate and print samples, with a reward function that fails only on the second."""
    survival.quieten()
    trainer = survival.build(folder, per_device_eval_batch_size=2)
    trainer.eval_dataset = trainer.train_dataset.select(range(6))
    if trainer.accelerator.process_index == 1:
        fail(trainer)
    samples = partial(trainer.generate_completions, sampling=True)
    for call in (trainer.evaluate, trainer.generate_completions, samples):
        with pytest.raises(RewardError, match="fails_on_request"):
            call()


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("endings")
    return folder, survival.program("tests.end_to_end.test_failures_in_two_processes", folder)


@on_pinned_transformers("Older ones read a CPU's optimizer onto `cpu:0`, which torch does not know.")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.what}-{case.name}-{case.ranks}")
def test_both_processes_end_and_the_run_is_resumed_bit_for_bit(ends, case):
    folder, found = ends
    index = CASES.index(case)
    assert found[index]["ended"] == list(case.statuses)
    assert found[index]["left"] == case.updates
    assert all(case.said in said for said in found[index]["said"]), found[index]["said"]
    assert found[index]["resumed"] == [0, 0]
    assert survival.same(folder / "uninterrupted", folder / str(index))


def test_a_run_of_two_processes_is_not_resumed_by_one(ends, tmp_path):
    folder, _ = ends
    with pytest.raises(ConfigError, match="number of processes: 2 in the checkpoint, 1 now"):
        survival.build(tmp_path).train(resume_from_checkpoint=folder / "uninterrupted" / "checkpoint-4")


def test_a_reward_that_fails_in_an_evaluation_on_one_process_raises_on_both(tmp_path):
    in_two_processes("-m", "tests.end_to_end.test_failures_in_two_processes", "evaluate", str(tmp_path), cwd=ROOT)


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_it_started_and_the_run_is_resumed(ends, tmp_path):
    config = ROOT / "examples" / "accelerate" / "cpu_gloo.yaml"
    port = environment()["MASTER_PORT"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        port,
    ]
    launch += ["-m", "tests.end_to_end.test_failures_in_two_processes", "worker", str(tmp_path / "run")]
    (tmp_path / "wait").touch()
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(launch, cwd=ROOT, stdout=log, stderr=log)
        while not all((tmp_path / f"waiting-{rank}").exists() for rank in range(2)):
            assert launcher.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        started = time.monotonic()
        launcher.terminate()
        ended = launcher.wait(PATIENCE)
        print(f"the launcher ended with {ended} after {time.monotonic() - started:.1f} s")
        assert ended != 0 and time.monotonic() - started < 30
        assert len(load_records(tmp_path / "run")) == 3
        assert checkpoint.newest_complete(tmp_path / "run").name == "checkpoint-3"
        (tmp_path / "wait").unlink()
        subprocess.run(launch, cwd=ROOT, stdout=log, stderr=log, check=True, timeout=600)
    assert survival.same(ends[0] / "uninterrupted", tmp_path / "run")


if __name__ == "__main__":
    if sys.argv[1] in ("worker", "evaluate"):
        {"worker": worker, "evaluate": evaluate}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
