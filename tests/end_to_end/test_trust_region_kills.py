"""GRPO with a `TrustRegionCallback` in two processes with FSDP2 or ZeRO, of which one is killed at any moment: the other ends,
and the run is resumed bit for bit.

The tests start this file as a program, once for each engine; it forks the processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import sharded, survival
from tests.survival import pair, without_clock
from tests.tiny import LIMIT
from tests.trl_trainers import trainer_of
from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes, pytest.mark.slow]
KILLS, SEED, SLOWEST = 10, 20261127, 60.0
SAVED = ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
"""What transformers writes last into a checkpoint."""


def train(run: Path, at: int = -1, rank: int = 0) -> None:
    """Train, or resume from the newest complete checkpoint; the process `rank` is killed before its moment `at`."""
    settings = {"num_iterations": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of("grpo", run, per_device_train_batch_size=2, use_cpu=False, **settings)
    trainer.add_callback(BoundReportCallback(report=False))
    callback = TrustRegionCallback(trainer, max_kl=LIMIT, lr_target=LIMIT / 2)
    trainer.add_callback(callback)
    mine, index = trainer.accelerator.process_index == rank, trainer.accelerator.process_index
    names = ["_generate_and_score_completions", "_compute_loss", "_save_checkpoint"]
    targets: list[tuple[Any, str]] = [(trainer, name) for name in names]
    targets += [(callback, name) for name in ("on_pre_optimizer_step", "on_optimizer_step", "on_log")]
    complete = [each for each in run.glob("checkpoint-*") if all((each / name).exists() for name in SAVED)]
    newest = max(complete, key=lambda each: int(each.name.rpartition("-")[2]), default=None)
    with survival.counted(trainer, at if mine else -1, lambda _: os.kill(os.getpid(), signal.SIGKILL), targets) as seen:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    weights = {name: sharded.whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, run / f"weights-{index}.safetensors")
    (run / f"moments-{index}.json").write_text(json.dumps(seen))


def same(one: Path, other: Path) -> bool:
    """Whether two runs left equal records and weights, bit for bit."""
    records = [[without_clock(record) for record in load_records(run)] for run in (one, other)]
    for rank in range(2):
        a, b = (load_file(run / f"weights-{rank}.safetensors") for run in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return records[0] == records[1]


def main(folder: Path, engine: str) -> None:
    """Kill processes at random moments, and resume each run. Prints a line of JSON for each."""
    survival.quieten()
    sharded.on_cpus(engine)
    whole = folder / "uninterrupted"
    assert pair(whole, folder / "uninterrupted-log", train) == [0, 0]
    draw = random.Random(SEED)
    for index in range(KILLS):
        rank = draw.randrange(2)
        at = draw.randrange(len(json.loads((whole / f"moments-{rank}.json").read_text())))
        run, log = folder / str(index), folder / f"{index}-log"
        started = time.monotonic()
        found: dict[str, Any] = {"rank": rank, "at": at, "ended": pair(run, log, partial(train, at=at, rank=rank))}
        found["seconds"] = time.monotonic() - started
        found["left"] = sorted(path.name for path in run.glob("checkpoint-*"))
        if not found["left"]:
            shutil.rmtree(run, ignore_errors=True)
        found["resumed"] = pair(run, log, train)
        found["same"] = found["resumed"] == [0, 0] and same(whole, run)
        print(json.dumps(found), flush=True)


@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_the_other_process_ends_and_the_run_is_resumed_bit_for_bit(tmp_path, engine):
    sharded.require(engine)
    found = survival.program("tests.end_to_end.test_trust_region_kills", tmp_path, engine)
    assert len(found) == KILLS and sum(bool(each["left"]) for each in found) > 3
    for each in found:
        print(each)
        assert each["ended"][each["rank"]] == -signal.SIGKILL and each["ended"][1 - each["rank"]] not in (0, None)
        assert each["seconds"] < SLOWEST and each["same"], each


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
