"""A single process for tests of parts, and two communicating processes, started as by a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

from accelerate import Accelerator

from trl_trustkl.parallel.processes import Processes

ROOT = Path(__file__).parents[1]


def single_process() -> Processes:
    """A single process, for the test of a part."""
    return Processes(Accelerator(cpu=True))


def environment() -> dict[str, str]:
    """The environment variables that both processes share; RANK and LOCAL_RANK differ."""
    port = free_port()
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return common | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}


def in_two_processes(*command: str, cwd: Path) -> None:
    """Run Python with these arguments in two processes, in the folder `cwd`. AssertionError with its output if one fails.

    Another program may take the free port before these listen on it; then they are started again with another one.
    """
    try:
        _in_two_processes(*command, cwd=cwd)
    except AssertionError as error:
        if "EADDRINUSE" not in str(error):
            raise
        _in_two_processes(*command, cwd=cwd)


def _in_two_processes(*command: str, cwd: Path) -> None:
    common = environment()
    # A pipe would fill while the other process is waited for.
    outputs = [TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.as_main", *command],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd=cwd,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process, output in zip(processes, outputs, strict=True):
            code = process.wait(timeout=300)
            output.seek(0)
            assert code == 0, output.read()[-3000:]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            process.wait()
            output.close()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
