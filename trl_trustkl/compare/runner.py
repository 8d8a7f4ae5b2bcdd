"""Runs every setting with every seed, each in a separate folder and process; finished runs are not repeated."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import DataError
from ..records import BOUNDS_FILE
from .child import DONE_FILE, SETTINGS_FILE, write
from .settings import Comparison, slug

LOG_FILE = "run.log"
GRACE = 10.0  # seconds that a run may take to end after SIGTERM


class Job(NamedTuple):
    """A planned run; `made_with` is what done.json holds once it is finished."""

    setting: str
    seed: int
    folder: Path
    made_with: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.setting}, seed {self.seed}"


Start = Callable[[Job, int], subprocess.Popen[bytes]]
"""Starts the process of a job, which may use a number of threads."""


class Outcome(NamedTuple):
    """How a job ended; `error` is None for one that is finished."""

    job: Job
    seconds: float
    error: str | None


class Reporter(Protocol):
    """Shows the progress of the runs; called from several threads."""

    def started(self, job: Job) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...
    def progress(self, updates: int) -> None: ...


def jobs(comparison: Comparison, output_dir: Path, task: str) -> list[Job]:
    """Every setting with the first seed, then every setting with the second, and so on."""

    def job(seed: int, name: str, config: dict[str, Any]) -> Job:
        made_with = {"task": task, "updates": comparison.updates, "seed": seed, "config": config}
        return Job(name, seed, output_dir / slug(name) / f"seed-{seed}", made_with)

    return [job(seed, *setting) for seed in comparison.seeds for setting in comparison.settings.items()]


def unfinished(planned: Sequence[Job], *, overwrite: bool = False) -> list[Job]:
    """The jobs that are not finished. DataError for one that was made with other settings, unless it may be overwritten."""
    left, reasons = [], []
    for job in planned:
        made_with = _made_with(job.folder)
        if made_with == job.made_with:
            continue
        if made_with is not None and not overwrite:
            reasons.append(f"{job.folder} was made with {'; '.join(differences(made_with, job.made_with))}")
        left.append(job)
    if reasons:
        fix = "Fix: another --output-dir keeps both, --overwrite replaces those that differ."
        raise DataError("\n".join(reasons) + f".\n{fix}")
    return left


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "kl_coef 0.05, now 0.1" for each value that differs."""
    found = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        elif before != now or (key in old) != (key in new):
            was, is_now = (repr(each[key]) if key in each else "left open" for each in (old, new))
            found.append(f"{key} {was}, now {is_now}")
    return found


def _made_with(folder: Path) -> dict[str, Any] | None:
    """The settings that a finished run was made with; None if there is none."""
    try:
        made_with = json.loads((folder / DONE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / DONE_FILE} cannot be read ({error}). Fix: remove the folder.") from None
    return made_with if isinstance(made_with, dict) and (folder / BOUNDS_FILE).exists() else None


def _prepare(job: Job) -> None:
    """Make an empty folder with the job's settings, in place of an incomplete run; DataError for a folder with other files."""
    if job.folder.exists() and any(job.folder.iterdir()):
        if not (job.folder / SETTINGS_FILE).exists():
            raise DataError(f"{job.folder} exists but contains no run of a comparison. Fix: use another --output-dir.")
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.folder / SETTINGS_FILE, job.made_with)


def start_process(job: Job, threads: int) -> subprocess.Popen[bytes]:
    """Start the job in a new interpreter, with its output in the folder's log."""
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with open(job.folder / LOG_FILE, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trl_trustkl.compare.child", str(job.folder)],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that this process has exited
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C only reaches this process, which ends the others
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runner:
    """Runs jobs, `processes` at a time; a context manager that ends the jobs that are still running on exit."""

    def __init__(self, processes: int, reporter: Reporter, start: Start = start_process) -> None:
        self.pool = ThreadPoolExecutor(processes, thread_name_prefix="run")
        self.threads = max(1, cores() // processes)
        self.reporter, self.start = reporter, start
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
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
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.pool.shutdown(cancel_futures=True)

    def run(self, planned: Sequence[Job], every: float = 0.5) -> list[Outcome]:
        """The outcomes, in the order of the jobs; progress is reported at least `every` so many seconds."""
        counters = [UpdateCounter(job.folder / BOUNDS_FILE) for job in planned]
        for job in planned:
            _prepare(job)
        futures = [self.pool.submit(self._run, job) for job in planned]
        waiting = set(futures)
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


def _why(job: Job, status: int) -> str:
    """The last line that a failed run wrote, or how it ended."""
    try:
        with (job.folder / LOG_FILE).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
            log = file.read()
    except OSError:
        log = b""
    said = log.strip().rpartition(b"\n")[2].decode("utf-8", "replace").strip()
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return said if said and status > 0 else f"{ended}{': ' + said if said else ''}"


class UpdateCounter:
    """Counts the finished updates of a run while its file grows."""

    def __init__(self, file: Path) -> None:
        self.file, self.place, self.found = file, 0, 0

    def count(self) -> int:
        with contextlib.suppress(OSError), open(self.file, "rb") as lines:  # it may not exist yet
            lines.seek(self.place)
            self.found += lines.read().count(b"\n")
            self.place = lines.tell()
        return self.found
