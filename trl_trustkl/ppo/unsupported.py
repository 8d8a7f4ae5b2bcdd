"""What transformers and TRL offer and this version rejects: fields, callbacks, some optimizers and schedules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers.trainer_pt_utils import AcceleratorConfig

from ..errors import NotAvailableYetError, out_of_range, shown
from ..trl_compat.trl_trainers import steps_in_backward
from .sharding_checks import reject_launch

_KERNELS = (
    "scoring, stepping and measuring have to compute the same numbers. "
    "generation_kwargs={'cache_implementation': 'static', 'compile_config': {}} compiles sampling alone"
)

REJECTED = {
    "torch_compile": _KERNELS,
    "torch_compile_backend": _KERNELS,
    "torch_compile_mode": _KERNELS,
    "use_liger_kernel": "log-probabilities and exact KLs are computed in chunks here, without [B, T, V] logits in memory",
    "liger_kernel_config": "it configures `use_liger_kernel`, which this trainer rejects",
    "parallelism_config": "use one process, or several with DDP, FSDP2 or DeepSpeed",
    "neftune_noise_alpha": "with noise in the embeddings, the ratio would not be 1 before the first step",
    "auto_find_batch_size": "the batch is a part of the algorithm; set a smaller per_device_train_batch_size",
    "train_sampling_strategy": "every pass over the dataset has a new random order",
    "group_by_length": "every pass over the dataset has a new random order",
    "label_smoothing_factor": "the losses of PPO have no labels",
    "average_tokens_across_devices": "the losses are always averages over all processes",
    "bf16_full_eval": "an evaluation computes as training does, with `bf16` or without",
    "fp16_full_eval": "an evaluation computes as training does, with `fp16` or without",
    "include_num_input_tokens_seen": "tokens are not counted; `episode` counts the responses, and their length is logged",
    "debug": "an update that is not finite is rolled back, and its record says what was not finite",
}
"""Fields that accept only what turns them off, and why. Some exist only in some versions of transformers."""

_ON_UNLESS = {
    "torch_compile_backend": (),
    "torch_compile_mode": (),
    "parallelism_config": (),
    "average_tokens_across_devices": (True,),
    "train_sampling_strategy": ("random",),
    "include_num_input_tokens_seen": ("no", False),
}
"""The values besides None with which a field asks for nothing; for all others: 0, False, and what is empty."""


def reject_unsupported(args: Any) -> None:
    """Raise NotAvailableYetError for a configuration that asks for one of them; before transformers reads it."""
    reject_launch(args)
    for name, why in REJECTED.items():
        value = getattr(args, name, None)
        if value is not None and (value not in _ON_UNLESS[name] if name in _ON_UNLESS else value):
            raise NotAvailableYetError(
                f"`{name}` got {shown(value)}, which is not supported by this trainer; leave it out: {why}."
            )
    accelerator = args.accelerator_config
    if accelerator is not None and not isinstance(accelerator, (AcceleratorConfig, dict, str, os.PathLike)):
        valid = "an AcceleratorConfig, a dict, JSON, the path of a JSON file, or None"
        raise out_of_range("accelerator_config", accelerator, valid)
    _reject_launcher()
    _reject_optimizers(args)


def reject_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise NotAvailableYetError for a callback of TRL that cannot work with this trainer."""
    reasons = {
        "SyncRefModelCallback": "set `sync_ref_model=True` instead, which works with adapters too and is saved in checkpoints",
        "BEMACallback": "it builds a second model of the class of `trainer.model`, which holds policy and value; remove it",
        "SyncTeacherModelCallback": "it makes the teacher of TRL's trainers of self-distillation; remove it",
        "PEFTAdapterEMACallback": "it makes the teacher of TRL's trainers of self-distillation; remove it",
    }
    for callback in callbacks:
        kinds = (kind.__name__ for kind in type(callback).__mro__ if kind.__module__.startswith("trl."))
        if (why := next((reasons[kind] for kind in kinds if kind in reasons), None)) is not None:
            raise NotAvailableYetError(
                f"`callbacks` got a {type(callback).__name__}, which is not supported by this trainer: {why}."
            )


def _reject_launcher() -> None:
    """What a launcher asks for in the environment."""
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise NotAvailableYetError(
            f"accelerate's `dynamo_backend` is not supported by this trainer; leave it at no: {_KERNELS}."
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise NotAvailableYetError(
            "accelerate's `parallelism_config` is not supported by this trainer; leave it out: "
            f"{REJECTED['parallelism_config']}."
        )


def reject_accelerator_config(given: Any) -> None:
    """Raise NotAvailableYetError for what transformers' `AcceleratorConfig` changes about the batches."""
    for name in ("split_batches", "gradient_accumulation_kwargs"):
        if value := getattr(given, name):
            raise NotAvailableYetError(
                f"`accelerator_config` got {name}={shown(value)}, which is not supported by this trainer; leave it out, and "
                "set per_device_train_batch_size and gradient_accumulation_steps."
            )


def _reject_optimizers(args: Any) -> None:
    """Optimizers whose updates cannot be limited or rolled back, and schedules that wait for a metric."""
    optimizer, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    why = None
    if steps_in_backward(args):
        why = "steps within the backward pass, where no gradient norm can be limited and no update rolled back"
    elif optimizer.startswith("schedule_free"):
        why = "trains other weights than those that it saves"
    if why is not None:
        raise NotAvailableYetError(
            f"`optim` got {optimizer!r}, which is not supported by this trainer: it {why}. Use 'adamw_torch', or "
            "'adamw_8bit' or 'adafactor' for less memory."
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise NotAvailableYetError(
            f"`lr_scheduler_type` got {schedule!r}, which is not supported by this trainer: schedules step once in every "
            "update. Use another schedule, such as 'linear', or set `trust_lr_target`, which adapts the learning rate to the "
            "KL of the updates."
        )
