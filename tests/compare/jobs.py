"""A task on a tiny model, and processes that stand in for the runs of a comparison: one finishes at once, one never does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import tiny
from tests.example_runs import Row, completions_of, rows_of, write_run
from trl_trustkl import BoundReportCallback, TrustKLGRPOConfig, TrustKLGRPOTrainer
from trl_trustkl.compare import child, settings
from trl_trustkl.compare.runner import Job, Outcome, Runner

TASK = "tests.compare.jobs:tiny_task"


def tiny_task(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Any:
    return tiny.trainer(output_dir, changes=changes, callbacks=list(callbacks))


GRPO_TASK = "tests.compare.jobs:tiny_grpo_task"


def tiny_grpo_task(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, **tiny.QUIET}
    args = TrustKLGRPOConfig(output_dir, **settings | changes)
    return TrustKLGRPOTrainer(
        tiny.llama(), tiny.good_words, args, train_dataset=tiny.prompts(), processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(), callbacks=[BoundReportCallback(report=False), *callbacks],
    )  # fmt: skip


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


TWO = settings.Comparison(3, (1, 2), {"a": {"kl_coef": 0.1}, "b": {"kl_coef": 0.2}})


class Silent:
    """A reporter that keeps what is reported to it."""

    def __init__(self) -> None:
        self.begun: list[Job] = []
        self.over: list[Outcome] = []
        self.updates: list[int] = []

    def started(self, job: Job) -> None:
        self.begun.append(job)

    def ended(self, outcome: Outcome) -> None:
        self.over.append(outcome)

    def progress(self, updates: int) -> None:
        self.updates.append(updates)


class Instant:
    """Starts processes that write the records of their run when they are waited for; `fails`: the jobs that fail."""

    def __init__(self, rows: Callable[[Job], list[Row]] | None = None, fails: Callable[[Job], bool] = lambda _: False):
        self.rows = rows or (lambda job: rows_of(job.made_with["updates"]))
        self.fails, self.started = fails, []

    def __call__(self, job: Job, threads: int) -> Instant:
        self.started.append((job.setting, job.seed, threads))
        process = Instant(self.rows, self.fails)
        process.job = job
        return process

    def wait(self, timeout: float | None = None) -> int:
        rows = self.rows(self.job)
        if self.fails(self.job):
            write_run(self.job.folder, rows[:1])
            log = "Traceback …\nValueError: \x1b[31mno luck\x1b[0m\n\n"
            (self.job.folder / "run.log").write_text(log, encoding="utf-8")
            return 1
        write_run(self.job.folder, rows, completions_of(rows))
        child.write(self.job.folder / child.DONE_FILE, self.job.made_with)
        return 0

    def terminate(self) -> None: ...

    kill = terminate


class InThisProcess:
    """A process that trains its run when it is waited for, in a thread of this process."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job = job

    def wait(self, timeout: float | None = None) -> int:
        child.run(self.job.folder)
        return 0

    def terminate(self) -> None: ...

    kill = terminate


class Endless:
    """A process that runs until it is terminated."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        assert self.over.wait(30 if timeout is None else timeout)
        return -15

    def terminate(self) -> None:
        self.over.set()

    kill = terminate


def make(planned: Sequence[Job], start: Any, processes: int = 1) -> tuple[list[Outcome], Silent]:
    """Run the jobs; returns the outcomes and the reporter."""
    reporter = Silent()
    with Runner(processes, reporter, start) as runner:
        return runner.run(planned, every=0.01), reporter
