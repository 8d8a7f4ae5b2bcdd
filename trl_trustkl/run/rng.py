"""Random numbers: seeds of the trainer's draws, which depend only on the configured seed and the update; and the random
states of a process (Python, NumPy, torch, GPU) as JSON, which reward functions and callbacks use.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..parallel.processes import Processes


class RngStream(enum.IntEnum):
    """The purpose of a random number; part of its seed, so that different purposes have different streams."""

    GENERATE = 0
    MICRO_BATCHES = 1
    MINI_BATCHES = 2
    EVALUATE = 3


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's random state inside the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore the process's random states after the block."""
    states = capture()
    try:
        yield
    finally:
        restore(states)


def generator(*keys: int) -> torch.Generator:
    """A new generator, seeded from `keys`."""
    return torch.Generator().manual_seed(mixed_seed(*keys))


def mixed_seed(*keys: int) -> int:
    """Hash several numbers to one seed."""
    digest = hashlib.blake2b(repr(tuple(int(key) for key in keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ProcessRandomStates:
    """The random states of all processes, for checkpoints. Both methods are called by all processes.

    Among more processes than were saved, several get the same state.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def state_dict(self) -> list[dict[str, Any]]:
        return self._processes.gather_objects([capture()])

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        restore(states[self._processes.index % len(states)])


def capture() -> dict[str, Any]:
    """The current random states, for `restore`; they may be stored as JSON."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _as_text(torch.get_rng_state()),
        "cuda": _as_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore(states: dict[str, Any]) -> None:
    """Restore the random states; the GPU's if there is a GPU and it was captured."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_as_tensor(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_as_tensor(states["cuda"]))


def _as_text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
