"""What a run was made with: `run_settings.json`, which the report shows."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
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
        "options": _without_secrets(args.to_dict()),
    }


@cache  # Reading a library's metadata takes milliseconds.
def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


_SECRET = re.compile(r"token$|secret|password|api_?key|authorization", re.I)
_USER = re.compile(r"(?<=//)[^/@\s]+@")


def _without_secrets(value: Any, *, top: bool = True) -> Any:
    """The options for JSON. transformers masks the fields that are tokens of the Hub; here also what is within a field, as in
    `model_init_kwargs`, and the user and password of an address."""
    if isinstance(value, dict):
        return {
            str(key): "<hidden>" if not top and _SECRET.search(str(key)) and each else _without_secrets(each, top=False)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_secrets(each, top=False) for each in value]
    return _USER.sub("", value) if isinstance(value, str) else value
