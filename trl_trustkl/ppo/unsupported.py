"""What transformers offers and this version refuses: sharded models, other kernels and loops, some optimizers and schedules."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env

from ..errors import NotAvailableYetError, shown


def reject_sharding(args: Any) -> None:
    for name, given, flag in (
        ("FSDP", args.fsdp, "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
    ):
        if given or parse_flag_from_env(flag):
            raise sharding_error(name)


def sharding_error(name: str) -> NotAvailableYetError:
    """The error for FSDP and DeepSpeed, which says what does work."""
    return NotAvailableYetError(
        f"{name} is not available yet in this version; one process, or several with DDP, work: accelerate launch "
        "--config_file examples/accelerate/multi_gpu.yaml (cpu_gloo.yaml without a GPU). LoRA or QLoRA (peft_config, a 4-bit "
        "model) saves most of the memory that sharding would."
    )


def reject_other_kernels(args: Any) -> None:
    """Compiled and patched kernels would be others in one pass than in the next, and the ratio not 1 before the first step."""
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


def reject_other_loops(args: Any) -> None:
    """What belongs to the loop of transformers' own trainer, and would be ignored in silence here."""
    for name, why in (
        (
            "neftune_noise_alpha",
            "noise in the embeddings would make the ratio something else than 1 before the first step",
        ),
        ("auto_find_batch_size", "the batch is a part of the algorithm; set a smaller per_device_train_batch_size"),
    ):
        if getattr(args, name):
            raise NotAvailableYetError(
                f"`{name}` got {shown(getattr(args, name))}, which is not available in this version; leave it out: {why}."
            )


def reject_optimizers(args: Any) -> None:
    """Those that step where an update cannot be looked at, and schedules that wait for a metric instead of an update."""
    optimizer, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    why = "steps within the backward pass, where no gradient norm can be limited and no update undone"
    why = "trains other weights than those that it saves" if optimizer.startswith("schedule_free") else why
    if optimizer.startswith(("lomo", "adalomo", "schedule_free")) or optimizer.endswith("_layerwise"):
        raise NotAvailableYetError(
            f"`optim` got {optimizer!r}, which is not available in this version: it {why}. Use 'adamw_torch', or "
            "'adamw_8bit' or 'adafactor' for less memory."
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise NotAvailableYetError(
            f"`lr_scheduler_type` got {schedule!r}, which is not available in this version: schedules step once in every "
            "update. Use another, such as 'linear', or `trust_lr_target`: it moves the learning rate by the KL of the updates."
        )
