"""Features of transformers that this version rejects: sharding, other kernels and loops, some optimizers and schedules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env

from ..errors import NotAvailableYetError, shown
from ..trl_compat.trl_trainers import steps_in_backward


def reject_unsupported(args: Any) -> None:
    """Raise NotAvailableYetError for a configuration that asks for one of them."""
    reject_sharding(
        fsdp=args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        deepspeed=args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
    )
    _reject_kernels(args)
    _reject_loops(args)
    _reject_optimizers(args)


def reject_sharding(*, fsdp: Any, deepspeed: Any) -> None:
    """Raise NotAvailableYetError where either is on."""
    for name, used in (("FSDP", fsdp), ("DeepSpeed", deepspeed)):
        if used:
            raise NotAvailableYetError(
                f"{name} is not available yet in this version; one process, or several with DDP, work: accelerate launch "
                "--config_file examples/accelerate/multi_gpu.yaml (cpu_gloo.yaml without a GPU). LoRA or QLoRA (peft_config, "
                "a 4-bit model) saves most of the memory that sharding would."
            )


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
                f"`callbacks` got a {type(callback).__name__}, which is not available in this version: {why}."
            )


def _reject_kernels(args: Any) -> None:
    """With compiled or patched kernels, the passes would differ and the ratio would not be 1 before the first step."""
    compiled = args.torch_compile or args.torch_compile_backend or args.torch_compile_mode
    if compiled or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise NotAvailableYetError(
            "`torch_compile` is not available yet in this version: sampling, scoring and stepping have to compute the same "
            "numbers. Leave `torch_compile`, its backend and mode out, and accelerate's `dynamo_backend` at no."
        )
    if args.use_liger_kernel:
        raise NotAvailableYetError(
            "`use_liger_kernel` is not available yet in this version; it must be False. Log-probabilities and exact KLs are "
            "computed in chunks here, without [B, T, V] logits in memory."
        )


def _reject_loops(args: Any) -> None:
    """Options of transformers' training loop, which would be ignored silently."""
    reasons = {
        "neftune_noise_alpha": "with noise in the embeddings, the ratio would not be 1 before the first step",
        "auto_find_batch_size": "the batch is a part of the algorithm; set a smaller per_device_train_batch_size",
    }
    for name, why in reasons.items():
        if getattr(args, name):
            raise NotAvailableYetError(
                f"`{name}` got {shown(getattr(args, name))}, which is not available in this version; leave it out: {why}."
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
            f"`optim` got {optimizer!r}, which is not available in this version: it {why}. Use 'adamw_torch', or "
            "'adamw_8bit' or 'adafactor' for less memory."
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise NotAvailableYetError(
            f"`lr_scheduler_type` got {schedule!r}, which is not available in this version: schedules step once in every "
            "update. Use another, such as 'linear', or `trust_lr_target`: it moves the learning rate by the KL of the updates."
        )
