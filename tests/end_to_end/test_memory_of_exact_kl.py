"""The memory that exact divergences need: nothing of the size tokens × vocabulary.

A separate process runs a few tokens, twice since libraries keep buffers of the first run, and then three times as many; its
peak memory must not rise. The allocator is set to return freed blocks to the system, so that the peak is the memory held at one
time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
VOCAB, FEW, MANY = 50_000, 128, 384
MIB = 2**20
SCRIPT = f"""
import json
import torch
from trl_trustkl.policy.exact_kl import token_statistics
from trl_trustkl.types import PolicySnapshot

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

head = torch.nn.Linear(8, {VOCAB}, bias=False).requires_grad_(False)
hidden, targets = torch.randn({MANY}, 8), torch.randint({VOCAB}, ({MANY},))
old = PolicySnapshot(hidden + 0.1, head)
growth = []
for backward in (False, True):
    peaks = []
    for count in ({FEW}, {FEW}, {MANY}):
        new = hidden[:count].clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            kl = token_statistics(
                new, targets[:count], head, vocab_size={VOCAB}, entropy=not backward,
                old=PolicySnapshot(old.hidden[:count], head)
            ).old_kl.sum()
            if backward:
                kl.backward()
        peaks.append(peak())
    growth.append(peaks[2] - peaks[1])
print(json.dumps(growth))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_memory_of_exact_divergences_does_not_grow_with_the_tokens():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    one_tensor = (MANY - FEW) * VOCAB * 4
    for growth in json.loads(done.stdout.splitlines()[-1]):
        assert growth < one_tensor / 3
