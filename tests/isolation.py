"""Hides the settings and the home directory of the user from the tests. Import this module first: libraries read both when
they are imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

# Prefixes of variables that change what a test sees: settings of libraries, of trackers, of launchers, of pip, and of
# the Python programs that tests start.
HIDDEN = """
    ACCELERATE_ FSDP_ HF_ HUGGINGFACE_ MPL PARALLELISM_CONFIG_ TQDM_ TRANSFORMERS_ TRL_ XDG_
    CLEARML_ COMET_ MLFLOW_ SWANLAB_ TENSORBOARD_ TRACKIO_ WANDB_
    GROUP_ LOCAL_ MASTER_ MV2_ OMPI_ PET_ PMI_ RANK ROLE_ SLURM_ TORCHELASTIC_ WORLD_
    PIP_ PYTHONIOENCODING PYTHONOPTIMIZE PYTHONSAFEPATH PYTHONUNBUFFERED PYTHONUTF8 PYTHONWARNINGS
"""
TERMINAL = ("LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")

for name in [name for name in os.environ if name.startswith(tuple(HIDDEN.split()))]:
    del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker uses the home directory of the process that started it
    home = tempfile.TemporaryDirectory(prefix="trl-trustkl-home-", ignore_cleanup_errors=True)
    os.environ["HOME"] = home.name


@contextmanager
def terminal() -> Iterator[None]:
    """80 columns, and no variable that sets colours; only within a test, because pytest reads these variables too."""
    with mock.patch.dict(os.environ, COLUMNS="80"):
        for name in TERMINAL:
            os.environ.pop(name, None)
        yield
