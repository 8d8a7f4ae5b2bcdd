"""What a run was made with: `settings.json`, which the report shows."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

LIBRARIES = (
    "trl-trustkl",
    "trl",
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "vllm",
)


def settings_of(args: TrainingArguments, model: Any) -> dict[str, dict[str, Any]]:
    """The model, the versions of the libraries that are installed, the hardware, and every option, without secrets."""
    policy = getattr(model, "policy", model)
    policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    state = PartialState()
    hardware = {"processes": state.num_processes, "CPU": f"{os.cpu_count()} cores, {platform.machine()}"}
    if state.device.type == "cuda":
        hardware["GPU"] = torch.cuda.get_device_name(state.device)
    return {
        "model": {
            "name": getattr(getattr(policy, "config", None), "_name_or_path", ""),
            "class": type(policy).__name__,
        },
        "versions": {"Python": platform.python_version()} | _versions(),
        "hardware": hardware,
        "options": _without_tokens(args.to_dict()),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _without_tokens(value: Any) -> Any:
    """transformers masks the fields that are tokens of the Hub; here also those within a field, as of `model_init_kwargs`."""
    if not isinstance(value, dict):
        return value
    return {
        key: "<hidden>" if key in ("token", "use_auth_token") else _without_tokens(each) for key, each in value.items()
    }
