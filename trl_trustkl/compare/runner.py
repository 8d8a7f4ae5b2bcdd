"""Every setting with every seed, each run in a folder and a process of its own; finished runs are not made again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from ..errors import DataError
from ..records import BOUNDS_FILE
from .child import DONE_FILE, SETTINGS_FILE, write
from .settings import Comparison, slug

LOG_FILE = "run.log"
GRACE = 10.0  # seconds that a run has to end after it was told to


class Job(NamedTuple):
    """A run that is to be made."""

    setting: str
    seed: int
    folder: Path
    made_with: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.setting}, seed {self.seed}"


class Outcome(NamedTuple):
    """How a job ended; `error` is None for one that is finished."""

    job: Job
    seconds: float
    error: str | None


class Process(Protocol):
    """As much of `subprocess.Popen` as running a job needs."""

    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[Job, int], Process]


class Reporter(Protocol):
    """What is told while runs are made; called from several threads."""

    def started(self, job: Job) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...
    def progress(self, updates: int) -> None: ...


def jobs(comparison: Comparison, output_dir: Path, task: str) -> list[Job]:
    """Seed by seed, so that every setting has a run before any has two."""
    return [
        Job(
            name,
            seed,
            output_dir / slug(name) / f"seed-{seed}",
            {"task": task, "updates": comparison.updates, "seed": seed, "config": fields},
        )
        for seed in comparison.seeds
        for name, fields in comparison.settings.items()
    ]


# -- what is there already ----------------------------------------------------------------------------------------------


def unfinished(planned: Sequence[Job], *, overwrite: bool = False) -> list[Job]:
    """The jobs that are still to be run. DataError if one was made under other settings, unless it may be overwritten."""
    left, reasons = [], []
    for job in planned:
        made_with = _made_with(job.folder)
        if made_with == job.made_with:
            continue
        if made_with is not None and not overwrite:
            reasons.append(f"{job.folder} was made with {'; '.join(differences(made_with, job.made_with))}")
        left.append(job)
    if reasons:
        raise DataError(
            "\n".join(reasons) + ".\nFix: another --output-dir keeps both, --overwrite replaces those that differ."
        )
    return left


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "kl_coef 0.05, now 0.1" for each value that is not the same."""
    found = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        elif before != now or (key in old) != (key in new):
            found.append(f"{key} {_value(old, key)}, now {_value(new, key)}")
    return found


def _value(of: dict[str, Any], key: str) -> str:
    return repr(of[key]) if key in of else "left open"


def _made_with(folder: Path) -> dict[str, Any] | None:
    """The settings of a finished run; None where there is none."""
    try:
        made_with = json.loads((folder / DONE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / DONE_FILE} cannot be read ({error}). Fix: remove the folder.") from None
    return made_with if isinstance(made_with, dict) and (folder / BOUNDS_FILE).exists() else None


def _prepare(job: Job) -> None:
    """An empty folder with the job's settings in it; a half run goes, what is not ours stays."""
    if job.folder.exists() and any(job.folder.iterdir()):
        if not (job.folder / SETTINGS_FILE).exists():
            raise DataError(f"{job.folder} is in the way: it holds no run of a comparison. Fix: another --output-dir.")
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.folder / SETTINGS_FILE, job.made_with)


# -- running -----------------------------------------------------------------------------------------------------------


def start_process(job: Job, threads: int) -> subprocess.Popen[bytes]:
    """The job in a fresh interpreter, its output in the folder's log."""
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with open(job.folder / LOG_FILE, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trl_trustkl.compare.child", str(job.folder)],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that we are gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to hand on
        )


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runner:
    """Runs jobs, `processes` at a time; as a context it ends what is still running when it is left."""

    def __init__(self, processes: int, reporter: Reporter, start: Start = start_process) -> None:
        self.pool = ThreadPoolExecutor(processes, thread_name_prefix="run")
        self.threads = max(1, cores() // processes)
        self.reporter, self.start = reporter, start
        self.lock = threading.Lock()
        self.running: set[Process] = set()
        self.stopping = False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.stopping = True
            running = list(self.running)
        for process in running:
            process.terminate()
        for process in running:
            _end(process)
        self.pool.shutdown(cancel_futures=True)

    def run(self, planned: Sequence[Job], every: float = 0.5) -> list[Outcome]:
        """The outcomes, in the order of the jobs; progress is told every so many seconds."""
        counters = [UpdateCounter(job.folder / BOUNDS_FILE) for job in planned]
        for job in planned:
            _prepare(job)
        waiting: set[Future[Outcome]] = set()
        futures = [self.pool.submit(self._run, job) for job in planned]
        waiting.update(futures)
        while waiting:
            _, waiting = wait_for(waiting, timeout=every)
            self.reporter.progress(sum(counter.count() for counter in counters))
        return [future.result() for future in futures]

    def _run(self, job: Job) -> Outcome:
        began = time.monotonic()
        with self.lock:
            if self.stopping:
                return Outcome(job, 0.0, "stopped before it began")
            self.reporter.started(job)
            process = self.start(job, self.threads)
            self.running.add(process)
        status = process.wait()
        with self.lock:
            self.running.discard(process)
        error = None if status == 0 and _made_with(job.folder) == job.made_with else _why(job, status)
        outcome = Outcome(job, time.monotonic() - began, error)
        if not self.stopping:
            self.reporter.ended(outcome)
        return outcome


def _end(process: Process) -> None:
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _why(job: Job, status: int) -> str:
    """The last line that a failed run wrote, or how it ended."""
    try:
        with open(job.folder / LOG_FILE, "rb") as log:
            lines = _tail(log).decode("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return said if said and status > 0 else f"{ended}{': ' + said if said else ''}"


def _tail(log: IO[bytes], size: int = 65_536) -> bytes:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - size))
    return log.read()


class UpdateCounter:
    """The finished updates of a run, counted as its file grows."""

    def __init__(self, file: Path) -> None:
        self.file, self.place, self.found = file, 0, 0

    def count(self) -> int:
        try:
            with open(self.file, "rb") as lines:
                lines.seek(self.place)
                self.found += lines.read().count(b"\n")
                self.place = lines.tell()
        except OSError:  # not there yet
            pass
        return self.found
