"""The SLURM recipe starts a run on several machines. Two launchers on this one stand for them, and a script for `srun`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import survival
from tests.processes import ROOT, free_port, in_two_processes

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes, pytest.mark.slow]
WORKER = ("-m", "tests.end_to_end.test_failures_in_two_processes", "worker")
SRUN = """#!/bin/bash
shift  # its own option
for rank in 0 1; do SLURM_NODEID=$rank "$@" & started+=($!); done
for each in "${started[@]}"; do wait "$each" || exit 1; done
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'localhost\\nelsewhere\\n'
"""


def test_two_machines_are_two_processes(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1", "PORT": str(free_port()),
        "CONFIG": str(ROOT / "examples" / "accelerate" / "cpu_gloo.yaml"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch"), *WORKER, str(tmp_path / "machines")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    in_two_processes(*WORKER, str(tmp_path / "one"), cwd=ROOT)
    assert survival.same(tmp_path / "one", tmp_path / "machines")
