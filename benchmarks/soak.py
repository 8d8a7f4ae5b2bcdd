"""Make many updates of a tiny model, and check whether memory grows or files stay open.

    python benchmarks/soak.py [updates]

Prints the slope of the resident memory over each half of the run, in bytes per update; the resident memory at the start, at
the end, and after glibc has returned freed memory (Linux); and the open file handles at the start and the end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import tiny


class Watch(TrainerCallback):
    """Memory and open files after every update."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.memory: list[int] = []
        self.handles: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.memory.append(self.process.memory_info().rss)
        self.handles.append(self.process.num_fds())


def soak(folder: str | os.PathLike[str], updates: int) -> dict[str, float]:
    """Train for `updates`, with a checkpoint every 50 updates, and return what grew."""
    watch = Watch()
    changes = {"max_steps": updates, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2}
    changes |= {"logging_steps": 100, "kl_controller": "adaptive", "kl_target": 1.0, "trust_max_kl": 0.05}
    tiny.trainer(folder, changes=changes, callbacks=[watch]).train()
    half = updates // 2
    at_the_end = watch.memory[-1]
    give_back_freed_memory()
    return {
        "updates": updates,
        "bytes_per_update_first_half": slope(watch.memory[min(10, half) : half]),
        "bytes_per_update_second_half": slope(watch.memory[half:]),
        "mib_at_the_start": watch.memory[min(10, updates - 1)] / 2**20,
        "mib_at_the_end": at_the_end / 2**20,
        "mib_in_use": watch.process.memory_info().rss / 2**20,
        "handles_at_the_start": watch.handles[min(10, updates - 1)],
        "handles_at_the_end": watch.handles[-1],
    }


def give_back_freed_memory() -> None:
    """Return freed memory that Python and the C library hold to the operating system, where that is possible."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


def slope(values: list[int]) -> float:
    """The slope of the least-squares line through the values, per step."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    covariance = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return covariance / max(sum((i - middle) ** 2 for i in range(len(values))), 1.0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(scratch, int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    print(json.dumps(found, indent=2))
