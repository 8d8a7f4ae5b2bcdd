"""Saving a run, and going on from where it was saved: a mixin of the trainer.

A checkpoint holds, beside the policy as `save_model` gives it: `policy.safetensors`, what of the trained weights is not in
the model's own files under the names it has in memory (all of an adapter, nothing of a plain model); `value.safetensors`;
the states of optimizer, schedule and scaler in torch's format, read with `weights_only=True`; `rng.json`, `trustkl_state.json`
and transformers' `trainer_state.json`; and a manifest. Nothing in it is unpickled: `training_args.bin`, which transformers'
tools expect, is written and never read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .. import records
from ..errors import CheckpointError, ConfigError, SaveError
from ..run import checkpoint_folder as checkpoint
from ..run import resume_compatibility as settings
from ..run import rng
from ..run.state import OnlineTrainerState
from ..trl_compat.version import PPOTrainer
from ..trust.snapshot import Refusals

logger = logging.get_logger(__name__)

POLICY_FILE = "policy.safetensors"
VALUE_FILE = "value.safetensors"
RUN_FILE = "trustkl_state.json"
RNG_FILE = "rng.json"

_CONTROLLERS = {"kl_controller": "kl_state", "trust_controller": "trust_state", "lr_controller": "lr_state"}
_ADAPTER_NOTES = ("inference_mode", "peft_version", "base_model_name_or_path", "auto_mapping", "revision")


class Saving:
    """See the module. The trainer that mixes it in has the state to save."""

    _saved_step: int

    # -- writing -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone, an adapter as an adapter, ready for `from_pretrained`."""
        # Not TRL 1.12's PPO trainer's own, which is written for a loop that is not ours.
        super(PPOTrainer, self).save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        policy = self.model.policy
        # PEFT saves every adapter; the frozen clone that serves as reference is no part of the result.
        chosen = {"selected_adapters": [policy.active_adapter]} if isinstance(policy, PeftModel) else {}
        policy.save_pretrained(output_dir, state_dict=state_dict, **chosen)
        self._describe(Path(output_dir))
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-N` of the update that has just ended, once; SaveError on all processes where it fails on one."""
        if self._saved_step == self.state.global_step:
            return
        folder = Path(self.args.output_dir) / f"{checkpoint.PREFIX}{self.state.global_step}"
        self._note_best(folder)
        states = gather_object([rng.capture()])
        failure: Exception | None = None
        if self.args.should_save:
            try:
                self._write_checkpoint(folder, states)
            except SaveError as error:
                failure = error
        self._raise_everywhere(failure)
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            checkpoint.rotate(folder.parent, self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def _write_checkpoint(self, folder: Path, rng_states: list[dict[str, Any]]) -> None:
        with checkpoint.written_whole(folder) as unfinished:
            self.create_model_card(model_name=self._model_name)
            self.save_model(str(unfinished), _internal_call=True)
            policy = _trained_weights(self.model.policy)
            _save_weights(_without(policy, _names_in(unfinished)), unfinished / POLICY_FILE)
            _save_weights(_trained_weights(self.model.value), unfinished / VALUE_FILE)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(unfinished))
                self._save_scaler(str(unfinished))
                (unfinished / RNG_FILE).write_text(json.dumps(rng_states))
            (unfinished / RUN_FILE).write_text(json.dumps(self._run_state(), indent=2))
            self.state.stateful_callbacks = self._fresh_state().stateful_callbacks
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            for lines in (records.BOUNDS_FILE, records.COMPLETIONS_FILE):
                if (path := folder.parent / lines).exists():
                    records.sync(path)

    def _note_best(self, folder: Path) -> None:
        """Remember the best checkpoint, once there is one of the best update."""
        best = folder.with_name(f"{checkpoint.PREFIX}{self.state.best_global_step}")
        if best == folder or best.exists():
            self.state.best_model_checkpoint = str(best)

    def _run_state(self) -> dict[str, Any]:
        """What is neither weights nor transformers' own state."""
        now = settings.compared(self.args)
        return {
            "format": 1,
            "resumable": not self.args.save_only_model,
            "config": self._config,
            "changed": {name: value for name, value in now.items() if value != self._config.get(name)},
            "setup": self._fingerprint(),
            **self._controller_states(),
            "refusals": [self._refusals.total, self._refusals.in_a_row],
            "metrics": settings.as_json(self._metrics),
            "logged_step": self._logged_step,
            "last_loss": self._last_loss,
        }

    def _controller_states(self) -> dict[str, dict[str, float] | None]:
        states = {name: getattr(self, attribute) for name, attribute in _CONTROLLERS.items()}
        return {name: None if state is None else state._asdict() for name, state in states.items()}

    def _fingerprint(self) -> dict[str, Any]:
        """What a run depends on beside its configuration."""
        policy = self.model.policy
        adapter = None
        if isinstance(policy, PeftModel):
            full = settings.as_json(policy.peft_config[policy.active_adapter].to_dict())
            adapter = {key: value for key, value in full.items() if key not in _ADAPTER_NOTES}
        return {
            "number of processes": self.accelerator.num_processes,
            "rows of train_dataset": len(self.train_dataset),
            "vocabulary size": self.model.split_lm.vocab_size,
            "trained numbers of the policy": _count(self.model.policy),
            "trained numbers of the value": _count(self.model.value),
            "adapter": adapter,
        }

    def _raise_everywhere(self, error: Exception | None) -> None:
        """Raise what one process met on all of them: one that went on alone would wait for the others for ever."""
        first = next((e for e in gather_object([error]) if e is not None), None)
        if first is not None:
            raise first

    # -- going on ------------------------------------------------------------------------------------------------------

    def _find_checkpoint(self, wanted: str | os.PathLike[str] | bool | None) -> Path | None:
        """The checkpoint to go on from, the same on every process; None for a fresh run.

        Raises CheckpointError for a path that is no whole checkpoint, or one that holds the model alone.
        """
        answer: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                answer = [_find(wanted, Path(self.args.output_dir))]
            except CheckpointError as error:
                answer = [error]
        (found,) = broadcast_object_list(answer)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _clear_output(self, folder: Path | None) -> None:
        """Remove half-written folders, and move aside what an earlier run left that this one does not go on from.

        SaveError on all processes where output_dir cannot be written into: sooner than after the first update.
        """
        output = Path(self.args.output_dir)
        failure: SaveError | None = None
        if self.is_world_process_zero():
            try:
                with records.written(f"{output} cannot be written into"):
                    output.mkdir(parents=True, exist_ok=True)
                    TemporaryFile(dir=output).close()
                    checkpoint.remove_unfinished(output)
                    ours = folder is not None and folder.resolve().parent == output.resolve()
                    checkpoint.move_aside(output, after=checkpoint.number(folder) if ours else 0)
                    if folder is not None:
                        records.take_over(folder.parent, output)
            except SaveError as error:
                failure = error
        self._raise_everywhere(failure)

    def _restore_run(self, folder: Path) -> None:
        """Everything a checkpoint holds but the random states, which `_restore_random_states` puts back last."""
        run = _read(folder / RUN_FILE)
        self._compare(run, folder)
        load_weights(folder, self.model)
        self.state = OnlineTrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._load_optimizer_and_scheduler(str(folder))
        self._load_scaler(str(folder))
        self._restore_callbacks()
        if self.state.best_model_checkpoint is not None:
            self.state.best_model_checkpoint = str(folder.with_name(Path(self.state.best_model_checkpoint).name))
        for name, value in run["changed"].items():
            setattr(self.args, name, value)
        for name, attribute in _CONTROLLERS.items():
            if run[name] is not None:
                setattr(self, attribute, type(getattr(self, attribute))(**run[name]))
        self._refusals = Refusals(*run["refusals"])
        for name, values in run["metrics"].items():
            self._metrics[name] = values
        self._logged_step, self._last_loss = run["logged_step"], run["last_loss"]
        self._saved_step = self.state.global_step

    def _compare(self, run: dict[str, Any], folder: Path) -> None:
        """ConfigError that names every setting which would make this another run."""
        found = list(settings.differences(run["config"], self._config, self.args))
        now = self._fingerprint()
        for name, was in run["setup"].items():
            if was != now[name]:
                found.append(_difference(name, was, now[name]))
        if found:
            raise ConfigError(
                f"`resume_from_checkpoint` got {folder}, which was saved under other settings: "
                + "; ".join(found)
                + ". "
                "Resume with the checkpoint's settings; or start a new run from its weights, in another output_dir."
            )

    def _restore_callbacks(self) -> None:
        """What callbacks that can be exported had counted; transformers' own way replaces them by new ones, where asked."""
        for name, stored in self.state.stateful_callbacks.items():
            callbacks = [cb for cb in self.callback_handler.callbacks if type(cb).__name__ == name]
            for callback, data in zip(callbacks, stored if isinstance(stored, list) else [stored], strict=False):
                for attribute, value in data.get("attributes", {}).items():
                    setattr(callback, attribute, value)
        self._load_callback_state()

    def _restore_random_states(self, folder: Path) -> None:
        rng.restore(_read(folder / RNG_FILE)[self.accelerator.process_index])

    def _load_best_model(self) -> None:
        """`load_best_model_at_end`: the weights of policy and value with the best evaluation."""
        best = self.state.best_model_checkpoint
        if best is None:
            logger.warning("`load_best_model_at_end`: no checkpoint was saved at an evaluation; the last weights stay.")
            return
        self.accelerator.wait_for_everyone()
        if (what := checkpoint.damage(Path(best))) is not None:
            raise CheckpointError(f"`load_best_model_at_end`: {best} is not a whole checkpoint ({what}).")
        load_weights(Path(best), self.model)


def _find(wanted: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        folder = checkpoint.newest_whole(output_dir)
        if folder is None:
            logger.warning(f"`resume_from_checkpoint` got True; {output_dir} has no whole checkpoint: starting afresh.")
            return None
    else:
        folder = Path(wanted)
        if (what := checkpoint.damage(folder)) is not None:
            raise CheckpointError(
                f"`resume_from_checkpoint` got {str(wanted)!r}, which is not a whole checkpoint of this trainer: {what}. "
                "Give another checkpoint-N, or True for the last whole one in output_dir."
            )
    if not _read(folder / RUN_FILE).get("resumable"):
        raise CheckpointError(
            f"`resume_from_checkpoint` got {folder}, which holds the model alone (save_only_model=True): there is no "
            "optimizer to go on with. Start a new run from its weights, or resume from a full checkpoint."
        )
    return folder


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`resume_from_checkpoint`: {path} cannot be read ({error}); it is none of this trainer's checkpoints."
        ) from None


# -- weights -----------------------------------------------------------------------------------------------------------


def _trained_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _without(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name not in names}


def _names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    if weights:
        save_file(weights, path)


def load_weights(folder: Path, model: nn.Module) -> None:
    """The trained weights of policy and value from a whole checkpoint, bit for bit.

    Raises CheckpointError for a weight that is missing, or has another shape or type than the model's.
    """
    policy_files = [*sorted(folder.glob("model*.safetensors")), folder / POLICY_FILE]
    for module, files in ((model.policy, policy_files), (model.value, [folder / VALUE_FILE])):
        missing = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for path in files:
            _load_file(path, missing)
        if missing:
            raise CheckpointError(f"{folder} lacks trained weights of this model, such as {next(iter(missing))!r}.")


def _load_file(path: Path, missing: dict[str, nn.Parameter]) -> None:
    """Copy the weights a file has into the parameters that wait for them, and take those off the list."""
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in set(file.keys()) & set(missing):
            weight, parameter = file.get_tensor(name), missing.pop(name)
            if weight.shape != parameter.shape or weight.dtype != parameter.dtype:
                raise CheckpointError(
                    f"{path} has {name!r} as {weight.dtype} {list(weight.shape)}; the model has it as {parameter.dtype} "
                    f"{list(parameter.shape)}."
                )
            parameter.copy_(weight)


def _difference(name: str, was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        return ", ".join(f"{name} `{key}`: {was.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in keys)
    return f"{name}: {was!r} in the checkpoint, {now!r} now"
