"""Which settings may change when a run is resumed, and which must be the same."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..errors import ConfigError
from ..policy.loading import ACCESS
from ..policy.value_head import PolicyAndValue
from ..trl_compat.unused_fields import WITHOUT_EFFECT
from .weights import count

_LENGTH = "num_total_batches"
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")

HARMLESS = (
    # where and how the run is reported, saved and evaluated
    "output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end",
    "restore_callback_states_from_checkpoint", "num_sample_generations",
    "log_completions", "num_completions_to_print",
    # memory, devices and workers, which change numbers only by rounding
    "torch_empty_cache_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "use_cpu", "full_determinism", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "dataset_num_proc", "ds3_gather_for_generation",
    # what a run does when something goes wrong
    "grace_seconds", "max_refused", "reward_retries",
    # where vLLM runs, and its memory
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode",
    # what is recorded
    "attribution_every",
    # the length of the run, which is compared as the number of updates
    "max_steps", "num_train_epochs", "total_episodes",
    # what accepts only its default, and what has no effect
    "debug", *(name for name in WITHOUT_EFFECT if name not in ("batch_size", _LENGTH)),
)  # fmt: skip
"""Fields that may differ between a checkpoint and the run that resumes it. All others must be the same, including those
that later versions add."""

DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Fields that may differ, as may the number of processes, where they divide the same batch: numbers change only by rounding."""
_PROCESSES = "number of processes"
_HOW_TO_LOAD = (*ACCESS, "use_auth_token", "force_download", "proxies", "device_map", "max_memory")
"""Keys of `model_init_kwargs` that are secrets, or say from where and to where the same weights are loaded."""
_ADAPTER_NOTES = ("inference_mode", "peft_version", "base_model_name_or_path", "auto_mapping", "revision")


def compared(args: Any) -> dict[str, Any]:
    """The fields that must not change, as read from JSON."""
    fields = [field.name for field in dataclasses.fields(args) if field.init and field.name not in HARMLESS]
    own = {name: getattr(args, name) for name in fields}
    if "whiten_advantages" in own:  # older checkpoints have its value in effect
        own["whiten_advantages"] = args.whitens_advantages
    return _without_access(as_json(own))


def _without_access(config: dict[str, Any]) -> dict[str, Any]:
    """The fields without what may differ, or must not be written, in `model_init_kwargs`."""
    given = config.get("model_init_kwargs")
    if not isinstance(given, dict):
        return config
    return config | {
        "model_init_kwargs": {key: value for key, value in given.items() if key not in _HOW_TO_LOAD} or None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return str(value)


def as_json(value: Any) -> Any:
    """A value as it is read from a JSON file after being written to it."""
    return json.loads(json.dumps(value, default=_plain))


def differences(saved: dict[str, Any], now: dict[str, Any], args: Any, ignored: Sequence[str] = ()) -> Iterator[str]:
    """A message for each field that differs between the checkpoint and `now`, both as returned by `compared`."""
    saved = _without_access(saved)
    defaults = {f.name: as_json(f.default) for f in dataclasses.fields(args) if f.default is not dataclasses.MISSING}
    for name, value in now.items():
        was = saved.get(name, defaults.get(name))
        if was == value or name in ignored or (name == _LENGTH and not _depends_on_length(args)):
            continue
        if name == _LENGTH:
            name = "max_steps"
        why = " (the learning rate's schedule depends on the number of updates)" if name == "max_steps" else ""
        yield f"`{name}`: {was!r} in the checkpoint, {value!r} now{why}"


def _depends_on_length(args: Any) -> bool:
    """Whether the learning rate of an update depends on the number of updates."""
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return schedule not in _ENDLESS_SCHEDULES or 0 < (args.warmup_steps or 0) < 1


class RunSettings:
    """The settings of a run in its checkpoints: the initial configuration, and what callbacks changed since.

    `setup` is what the run depends on besides the configuration, by name.
    """

    def __init__(self, args: Any, setup: dict[str, Any]) -> None:
        self._args = args
        self._config = compared(args)
        self._setup = setup

    def state_dict(self) -> dict[str, Any]:
        now = compared(self._args)
        return {
            "resumable": not self._args.save_only_model,
            "config": self._config,
            "changed": {name: value for name, value in now.items() if value != self._config.get(name)},
            "setup": self._setup,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["changed"].items():
            setattr(self._args, name, value)

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """Raise a ConfigError that names every setting which differs from the checkpoint's and must not."""
        divided = self._is_divided_otherwise(state)
        ignored = DIVISION if divided else ()
        found = list(differences(state["config"], self._config, self._args, ignored))
        for name, was in state["setup"].items():
            if was != self._setup[name] and not (divided and name == _PROCESSES):
                found.append(_difference(name, was, self._setup[name]))
        if found:
            raise ConfigError(
                f"`resume_from_checkpoint` got {folder}, which was saved under other settings: {'; '.join(found)}. "
                "Resume with the checkpoint's settings; or start a new run from its weights, in another output_dir."
            )

    def _is_divided_otherwise(self, state: dict[str, Any]) -> bool:
        """Whether other processes, or another number of them, make the same batch, of which every step uses all."""
        batch = state["config"].get("batch_size")
        whole = self._args.num_mini_batches == 1 and self._args.measure_fraction == 1
        return whole and batch is not None and batch == self._config["batch_size"]


def setup_of(trained: PolicyAndValue, *, rows: int | None, processes: int) -> dict[str, Any]:
    """What a run depends on besides its configuration."""
    policy, adapter = trained.policy, None
    if isinstance(policy, PeftModel):
        everything = as_json(policy.peft_config[policy.active_adapter].to_dict())
        adapter = {key: value for key, value in everything.items() if key not in _ADAPTER_NOTES}
    return {
        _PROCESSES: processes,
        "rows of train_dataset": rows,
        "vocabulary size": trained.split_lm.vocab_size,
        "trained numbers of the policy": count(policy),
        "trained numbers of the value": count(trained.value),
        "adapter": adapter,
    }


def _difference(name: str, was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        return ", ".join(f"{name} `{key}`: {was.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in keys)
    return f"{name}: {was!r} in the checkpoint, {now!r} now"
