"""Saving a run, and going on from where it was saved.

A checkpoint holds, beside the policy as `save_model` gives it: `policy.safetensors`, what of the trained weights is not in
the model's own files under the names it has in memory (all of an adapter, nothing of a plain model); `value.safetensors`;
the states of optimizer, schedule and scaler in torch's format, read with `weights_only=True`; `rng.json`, `trustkl_state.json`
and transformers' `trainer_state.json`; and a manifest. Nothing in it is unpickled: `training_args.bin`, which transformers'
tools expect, is written and never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from .. import files, records
from ..errors import CheckpointError, SaveError
from ..parallel.processes import Processes
from . import checkpoint_folder
from .state import Stateful
from .weights import WeightsOnDisk, names_in

logger = logging.get_logger(__name__)

POLICY_FILE = "policy.safetensors"
VALUE_FILE = "value.safetensors"
RUN_FILE = "trustkl_state.json"
RNG_FILE = "rng.json"
RESUME_FILES = (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, RNG_FILE)
"""Files that only a run that goes on needs, which `save_only_model` leaves out."""

__all__ = [
    "OPTIMIZER_NAME", "POLICY_FILE", "RESUME_FILES", "RNG_FILE", "RUN_FILE", "SCALER_NAME", "SCHEDULER_NAME",
    "TRAINER_STATE_NAME", "VALUE_FILE", "Checkpointer",
]  # fmt: skip


class Checkpointer:
    """Saves and loads the parts of a run: each under the name of its file, whose ending says in which format.

    `.safetensors` holds weights, `.pt` what torch saves, `.json` numbers and text.

    Args:
        parts: what a checkpoint holds, by file name.
        processes: those of the run.
        write_model: writes the model's own files into a folder.
        writes: whether this process writes; one does on each disk.
    """

    def __init__(
        self,
        parts: Mapping[str, Stateful],
        processes: Processes,
        write_model: Callable[[Path], None],
        *,
        writes: bool,
    ) -> None:
        self._parts = dict(parts)
        self._processes = processes
        self._writes = writes
        self._write_model = write_model

    def save(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Write a checkpoint, complete or not at all, `without` some parts. SaveError on all processes where it fails."""
        states = {name: part.state_dict() for name, part in self._parts.items() if name not in without}
        failure: SaveError | None = None
        if self._writes:
            try:
                self.write(folder, states)
            except SaveError as error:
                failure = error
        self._processes.raise_on_all(failure)

    def write(self, folder: Path, states: Mapping[str, Any]) -> None:
        """The part of `save` that the processes do not do together."""
        with checkpoint_folder.written_atomically(folder) as unfinished:
            self._write_model(unfinished)
            for name, state in states.items():
                _write(unfinished / name, state)
            for lines in (records.BOUNDS_FILE, records.COMPLETIONS_FILE):
                if (path := folder.parent / lines).exists():
                    files.sync(path)

    def load(self, folder: Path, *names: str) -> None:
        """Load the parts of these names from a complete checkpoint, bit for bit; a file that is not there is passed over,
        as a part may be newer than the checkpoint.

        Raises CheckpointError for a file that cannot be read, or does not fit.
        """
        for name in names:
            if name in self._parts and (name.endswith(".safetensors") or (folder / name).exists()):
                state = _read(folder / name)
                try:
                    self._parts[name].load_state_dict(state)
                except CheckpointError as error:
                    raise CheckpointError(f"{folder / name}: {error}") from None
                except Exception as error:  # of a part, or of a library that reads for it
                    raise _unreadable(folder / name, error) from error

    def find(self, wanted: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
        """The checkpoint to go on from, the same on every process; None for a fresh run.

        Raises CheckpointError for a path that is no complete checkpoint, or one that holds the model alone.
        """
        found: Path | CheckpointError | None = None
        if self._processes.is_main:
            try:
                found = find_checkpoint(wanted, output_dir)
            except CheckpointError as error:
                found = error
        found = self._processes.from_main(found)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def prepare_output(self, output: Path, folder: Path | None) -> None:
        """Remove unfinished folders, and move aside what an earlier run left that this one does not go on from.

        `folder` is the checkpoint that the run goes on from. SaveError on all processes where `output` cannot be written
        into: sooner than after the first update.
        """
        failure: SaveError | None = None
        if self._processes.is_main:
            try:
                with records.written(f"{output} cannot be written into"):
                    output.mkdir(parents=True, exist_ok=True)
                    TemporaryFile(dir=output).close()
                    checkpoint_folder.remove_unfinished(output)
                    ours = folder is not None and folder.resolve().parent == output.resolve()
                    after = checkpoint_folder.number(folder) if folder is not None and ours else 0
                    checkpoint_folder.move_aside(output, after=after)
                    if folder is not None:
                        records.take_over(folder.parent, output)
            except SaveError as error:
                failure = error
        self._processes.raise_on_all(failure)


def find_checkpoint(wanted: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
    """As `Checkpointer.find`, for one process."""
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        folder = checkpoint_folder.newest_complete(output_dir)
        if folder is None:
            logger.warning(f"`resume_from_checkpoint` got True; {output_dir} has no whole checkpoint: starting afresh.")
            return None
    else:
        folder = Path(wanted)
        if (what := checkpoint_folder.damage(folder)) is not None:
            raise CheckpointError(
                f"`resume_from_checkpoint` got {str(wanted)!r}, which is not a whole checkpoint of this trainer: {what}. "
                "Give another checkpoint-N, or True for the last whole one in output_dir."
            )
    run = read_json(folder / RUN_FILE)
    if not isinstance(run, dict):
        raise _unreadable(folder / RUN_FILE, TypeError(f"a {type(run).__name__} instead of an object"))
    if not run.get("resumable"):
        raise CheckpointError(
            f"`resume_from_checkpoint` got {folder}, which holds the model alone (save_only_model=True): there is no "
            "optimizer to go on with. Start a new run from its weights, or resume from a full checkpoint."
        )
    return folder


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint; CheckpointError where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"`resume_from_checkpoint`: {path} cannot be read ({type(error).__name__}: {error}); it is none of this trainer's "
        "checkpoints."
    )


def _model_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _write(path: Path, state: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(state, indent=None if path.name == RNG_FILE else 2))
    elif path.suffix == ".pt":
        torch.save(state, path)
    else:
        there = {name for file in _model_files(path.parent) for name in names_in(file)}
        skipped = there if path.name == POLICY_FILE else set()
        if weights := {name: weight for name, weight in state.items() if name not in skipped}:
            save_file(weights, path)


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return read_json(path)
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        return _weights(path)
    except Exception as error:  # torch and safetensors have errors of their own
        raise _unreadable(path, error) from error


def _weights(path: Path) -> WeightsOnDisk:
    return WeightsOnDisk([*(_model_files(path.parent) if path.name == POLICY_FILE else ()), path])
