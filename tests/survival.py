"""Runs that are interrupted at a chosen moment, and what they leave on the disk.

A moment is a call of one of the functions in which a run spends its time or writes to the disk. Moments are counted, so that a
run can be interrupted at any of them: by an exception that is not caught, by a signal, or, in a separate process, by SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from datasets import disable_progress_bars
from torch import Tensor
from transformers.utils import logging

from tests import tiny
from tests.processes import ROOT, environment
from trl_trustkl import TrustKLPPOTrainer, load_records, records
from trl_trustkl.run import checkpointer

UPDATES = 6
PATIENCE = 120.0
"""Seconds after which a process that says nothing, or does not end, counts as hanging."""
PHASES = ("rollout", "score", "advantages", "optimise", "measure", "enforce", "attribute", "record")


class Killed(BaseException):
    """An exception that stands for a kill within the process: no error handler catches it."""


def noisy_reward(prompts: list, completions: list, **_: Any) -> list[float]:
    """A reward that draws from the random streams of Python, NumPy and torch."""
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [score + 0.1 * noise for score in tiny.good_words(prompts, completions)]


KINDS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "adapter and value head": (
        {
            "kl_controller": "pid",
            "kl_target": 0.5,
            "trust_controller": "adaptive",
            "trust_coef": 0.1,
            "trust_target": 0.01,
            "trust_lr_target": 0.01,
            "attribution_every": 3,
            "kl_placement": "both",
            "kl_estimator": "exact",
        },
        dict,
    ),
    "all weights and a value model": (
        {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 40, "trust_max_kl": 0.02},
        lambda: {"peft_config": None, "value_model": tiny.scalar_model(tiny.llama())},
    ),
    "adapter without a value": (
        {"advantage_estimator": "grpo", "num_generations": 4, "trust_max_kl": 0.02, "attribution_every": 3},
        dict,
    ),
}


SMOLLM2 = "SmolLM2 with QLoRA"


def build(folder: Any, kind: str = "adapter and value head", **changes: Any) -> TrustKLPPOTrainer:
    """A trainer that saves a checkpoint every second update."""
    if kind == SMOLLM2:
        from trl_trustkl.demo.task import sentiment_trainer

        settings = {"max_steps": UPDATES, "save_strategy": "steps", "save_steps": 2, "response_length": 12}
        settings |= {"gradient_accumulation_steps": 1, "kl_controller": "adaptive", "kl_target": 4.0, "kl_horizon": 40}
        return sentiment_trainer(str(folder), **settings | changes)
    settings, arguments = KINDS[kind]
    common = {
        "max_steps": UPDATES,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
    }
    return tiny.trainer(folder, changes=common | settings | changes, reward_funcs=noisy_reward, **arguments())


def moments(trainer: TrustKLPPOTrainer) -> list[tuple[Any, str]]:
    """The functions whose calls are a run's moments."""
    own: list[tuple[Any, str]] = [(trainer, name) for name in (*PHASES, "_save_checkpoint")]
    own += [(trainer._loop, "_end_update"), (checkpointer.Checkpointer, "write")]
    disk = [(os, "fsync"), (os, "rename"), (os, "replace"), (torch, "save"), (checkpointer, "save_file")]
    return [*own, (torch.optim.AdamW, "step"), (records, "append_line"), (Path, "write_text"), *disk]


Moment = int | tuple[str, int]
"""The number of a moment in the run; or the name of its function, and the number among the calls of that. Both count from 0."""


@contextmanager
def counted(
    trainer: Any, at: Moment, act: Callable[[str], None], targets: list[tuple[Any, str]] | None = None
) -> Iterator[list[str]]:
    """Call `act(name)` before the moment `at`; yields the names of the moments so far. `targets`: the functions whose calls are
    moments; None: those of a run of PPO."""
    seen: list[str] = []

    def watch(name: str, original: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if at == (len(seen) - 1 if isinstance(at, int) else (name, seen.count(name) - 1)):
                if name == "append_line":  # half a line
                    with open(args[0], "a") as file:
                        file.write(json.dumps(args[1])[: len(seen) % 40])
                act(name)
            return original(*args, **kwargs)

        return watched

    with _patched(moments(trainer) if targets is None else targets, watch):
        yield seen


@contextmanager
def _patched(targets: list[tuple[Any, str]], watch: Callable) -> Iterator[None]:
    patches = [mock.patch.object(owner, name, watch(name, getattr(owner, name))) for owner, name in targets]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def kill(name: str) -> None:
    raise Killed(name)


def cut_off(trainer: TrustKLPPOTrainer, at: Moment, act: Callable[[str], None] = kill) -> str | None:
    """Train until the moment `at`; returns the name of the moment, or None if the run ended before it."""
    with counted(trainer, at, act) as seen:
        try:
            trainer.train()
        except Killed:
            return seen[-1]
    return None


# -- what a run leaves -------------------------------------------------------------------------------------------------


def tensors(folder: Path, update: int = UPDATES) -> dict[str, Tensor]:
    """The weights and the optimizer's tensors in the checkpoint of an update."""
    checkpoint = folder / f"checkpoint-{update}"
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        found |= {f"{path.name} {name}": weight for name, weight in safetensors.torch.load_file(path).items()}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found |= {f"{i} {name}": torch.as_tensor(v) for i, entry in state.items() for name, v in entry.items()}
    return found


def left_behind(folder: Path) -> dict[str, Any]:
    """Everything of a run that does not depend on the clock: the last checkpoint's tensors and states, and the records."""
    checkpoint = folder / f"checkpoint-{UPDATES}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    own = json.loads((checkpoint / "trustkl_state.json").read_text())
    return {
        "records": [without_clock(row) for row in load_records(folder)],
        "completions": (folder / "completions.jsonl").read_text(),
        "log": [without_clock(row) for row in state.pop("log_history")],
        "state": state | {"best_model_checkpoint": None},
        "own": {key: value for key, value in own.items() if key != "metrics"},
        "rng": (checkpoint / "rng.json").read_text(),
    }


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if not key.startswith("seconds") and not key.endswith(("eps", "runtime"))
    }


def same(one: Path, other: Path) -> bool:
    """Whether two runs left equal checkpoints and records, bit for bit."""
    a, b = tensors(one), tensors(other)
    return left_behind(one) == left_behind(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- separate processes ------------------------------------------------------------------------------------------------


def fork(job: Callable[[], Any], log: Path) -> int:
    """Start a job in a forked process, its output in a file; returns the process id.

    The process ends with the exit status of Python, but without its cleanup, which takes longer than these runs. The program
    must not have used torch's threads yet.
    """
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 1
    try:
        job()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.stdout.flush()  # so that the error comes last in the log, however stdout is buffered
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end_of(child: int, seconds: float = 600.0) -> int | None:
    """The exit status of a forked process, or minus the signal that ended it; None if it ran too long and was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def forked(job: Callable[[], Any], log: Path) -> int | None:
    """Run a job in a forked process; returns the result of `end_of`."""
    return end_of(fork(job, log))


def pair(run: Path, log: Path, job: Callable[[Path], Any]) -> list[int | None]:
    """Run a job in two processes of one run, their output in files next to `log`; returns the result of `end_of` for each."""
    common = environment()
    children = []
    for rank in range(2):

        def one(rank: int = rank) -> None:
            os.environ |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            job(run)

        children.append(fork(one, log.with_name(f"{log.name}-{rank}")))
    return [end_of(child, PATIENCE) for child in children]


def quieten() -> None:
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def program(module: str, *arguments: object, before: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run a module of these tests as a separate program; returns the lines of JSON that it printed."""
    done = subprocess.run(
        [*before, sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def load_all(folder: Path) -> None:
    """Load what a trainer needs before the first fork, so that children need not load it."""
    quieten()
    build(folder / "not trained")


def train(run: Path, resume: bool = False) -> None:
    """Train the default kind of run."""
    build(run).train(resume_from_checkpoint=resume)


def main(folder: Path, kind: str, count: int, seed: int) -> None:
    """Kill runs with SIGKILL at random moments, and resume each. Prints a line of JSON for each."""
    quieten()

    def uninterrupted() -> None:
        trainer = build(folder / "uninterrupted", kind)
        with counted(trainer, -1, kill) as seen:
            trainer.train()
        (folder / "moments.json").write_text(json.dumps(seen))

    assert forked(uninterrupted, folder / "log") == 0, (folder / "log").read_text()
    names = json.loads((folder / "moments.json").read_text())
    # The large model is killed once, after its first checkpoint.
    choice = range(len(names) // 2 if kind == SMOLLM2 else 0, len(names))
    chosen = sorted(random.Random(seed).sample(choice, count))
    for at in chosen:
        run = folder / f"killed-{at}"

        def start(run: Path = run, at: int = at) -> None:
            cut_off(build(run, kind), at, lambda name: os.kill(os.getpid(), signal.SIGKILL))

        ended = forked(start, folder / "log")
        resumed = forked(lambda run=run: build(run, kind).train(resume_from_checkpoint=True), folder / "log")
        print(json.dumps({"at": at, "in": names[at], "ended": ended, "resumed": resumed, "run": str(run)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
