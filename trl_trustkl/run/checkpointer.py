"""Saving a run, and loading it to resume.

Besides the policy as `save_model` writes it, a checkpoint holds: `policy.safetensors`, the trained weights that the model's
files do not contain under their names in memory (all of an adapter, none of a plain model); `value.safetensors`;
`reference.safetensors` if the reference is renewed; the states of optimizer, schedule and scaler in torch's format, read with
`weights_only=True`; `rng.json`, `trustkl_state.json` and transformers' `trainer_state.json`; and a manifest. Nothing is
unpickled: `training_args.bin`, which transformers' tools expect, is written and never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .failure_handling import raised_on_all
from .state import Stateful
from .weights import ShardedOptimizer, WeightsOnDisk, names_in

logger = logging.get_logger(__name__)

POLICY_FILE = "policy.safetensors"
VALUE_FILE = "value.safetensors"
REFERENCE_FILE = "reference.safetensors"
RUN_FILE = "trustkl_state.json"
RNG_FILE = "rng.json"
RESUME_FILES = (REFERENCE_FILE, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, RNG_FILE)
"""Files that are needed only to resume a run, and that `save_only_model` leaves out."""


class Checkpointer:
    """Saves and loads the parts of a run.

    Args:
        parts: the parts by the names of their files; None for one that the run does not have. The suffix gives the format:
            `.safetensors` for weights, `.pt` for what torch saves, `.json` for numbers and text.
        processes: the processes of the run.
        write_model: writes the model's files into a folder, from what `gather_model` returned.
        writes: whether this process writes; one does on each disk.
        gather_model: gathers the model's weights from all processes, which call it together.
    """

    def __init__(
        self,
        parts: Mapping[str, Stateful | None],
        processes: Processes,
        write_model: Callable[[Path, Any], None],
        *,
        writes: bool,
        gather_model: Callable[[], Any] = lambda: None,
    ) -> None:
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self._processes = processes
        self._writes = writes
        self._write_model = write_model
        self._gather_model = gather_model

    def save(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Write a checkpoint atomically, `without` some parts. SaveError on all processes if it fails on one.

        One part after the other is gathered and written.
        """
        states = ((name, part.state_dict()) for name, part in self.parts.items() if name not in without)
        with raised_on_all(self._processes, SaveError):
            model = [self._gather_model()]  # a list, from which it is taken as soon as it is written
            try:
                if self._writes:
                    self.write(folder, model, states)
            finally:
                for _ in states:  # the other processes wait in what gathers them
                    pass

    def write(self, folder: Path, model: list[Any], states: Iterator[tuple[str, Any]]) -> None:
        """The part of `save` on the process that writes. `model` holds what `gather_model` returned."""
        with checkpoint_folder.written_atomically(folder) as unfinished:
            self._write_model(unfinished, model.pop())
            for name, state in states:
                _write(unfinished / name, state)
                del state  # before the next one is gathered
            for lines in (records.BOUNDS_FILE, records.COMPLETIONS_FILE):
                if (path := folder.parent / lines).exists():
                    files.sync(path)

    def load(self, folder: Path, *names: str) -> None:
        """Load the parts of these names from a complete checkpoint, bit for bit.

        A file that does not exist is skipped, as a part may be newer than the checkpoint; trained weights must exist.
        Raises CheckpointError for a file that cannot be read, or does not fit.
        """
        for name in names:
            if name in self.parts and (name.endswith(".safetensors") or (folder / name).exists()):
                state = _read(folder / name, mapped=isinstance(self.parts[name], ShardedOptimizer))
                try:
                    self.parts[name].load_state_dict(state)
                except CheckpointError as error:
                    raise CheckpointError(f"{folder / name}: {error}") from None
                except Exception as error:  # raised by the part or by a library that it uses for reading
                    raise _unreadable(folder / name, error) from error

    def find(self, wanted: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
        """`find_checkpoint` of the main process, with the same result on every process."""
        found: Path | None = None
        with raised_on_all(self._processes, CheckpointError):
            if self._processes.is_main:
                found = find_checkpoint(wanted, output_dir)
        return self._processes.from_main(found)

    def prepare_output(self, output: Path, folder: Path | None) -> None:
        """Remove unfinished folders, and move aside checkpoints of an earlier run that this one does not resume.

        `folder` is the checkpoint from which the run resumes. Raises SaveError on all processes if `output` is not writable,
        before any update is made.
        """
        with raised_on_all(self._processes, SaveError):
            if self._processes.is_main:
                with records.written(f"{output} cannot be written into"):
                    _prepare_output(output, folder)


def _prepare_output(output: Path, folder: Path | None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=output).close()
    checkpoint_folder.remove_unfinished(output)
    resumed = 0
    if folder is not None and folder.resolve().parent == output.resolve():
        resumed = read_json(folder / TRAINER_STATE_NAME)["global_step"]  # the folder may have been renamed
    if (earlier := checkpoint_folder.move_aside(output, after=resumed)) is not None:
        records.copy(output, earlier)
    if folder is not None:
        records.take_over(folder.parent, output)


def find_checkpoint(wanted: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a path, or the last complete one for True; None for a new run.

    Raises CheckpointError for a path that is not a complete checkpoint, and for a checkpoint that holds only the model.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        folder = checkpoint_folder.newest_complete(output_dir)
        if folder is None:
            logger.warning(
                f"`resume_from_checkpoint` got True; {output_dir} has no complete checkpoint: starting a new run."
            )
            return None
    else:
        folder = Path(wanted)
        if (what := checkpoint_folder.damage(folder)) is not None:
            raise CheckpointError(
                f"`resume_from_checkpoint` got {str(wanted)!r}, which is not a complete checkpoint of this trainer: {what}. "
                "Give another checkpoint-N, or True for the last complete one in output_dir."
            )
    run = read_json(folder / RUN_FILE)
    if not isinstance(run, dict):
        raise _unreadable(folder / RUN_FILE, TypeError(f"a {type(run).__name__} instead of an object"))
    if not run.get("resumable"):
        raise CheckpointError(
            f"`resume_from_checkpoint` got {folder}, which holds only the model (save_only_model=True): it has no optimizer "
            "state to resume with. Start a new run from its weights, or resume from a full checkpoint."
        )
    return folder


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint; CheckpointError if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"`resume_from_checkpoint`: {path} cannot be read ({type(error).__name__}: {error}); it is not a checkpoint of this "
        "trainer."
    )


def _model_files(path: Path) -> list[Path]:
    """The model's weight files in the same folder, if the file is `policy.safetensors`; none otherwise."""
    return sorted(path.parent.glob("model*.safetensors")) if path.name == POLICY_FILE else []


def _write(path: Path, state: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(state, indent=None if path.name == RNG_FILE else 2))
    elif path.suffix == ".pt":
        torch.save(state, path)
    else:
        written = {name for file in _model_files(path) for name in names_in(file)}
        if weights := {name: weight for name, weight in state.items() if name not in written}:
            save_file(weights, path)


def _read(path: Path, *, mapped: bool = False) -> Any:
    """The state in a file; `mapped` tensors are read from the file as they are used."""
    if path.suffix == ".json":
        return read_json(path)
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return WeightsOnDisk([*_model_files(path), path])
    except Exception as error:  # torch and safetensors raise errors of different types
        raise _unreadable(path, error) from error
