"""Setting up a trainer: its arguments, the arithmetic of batches, models on their devices, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..divergences import gradient_kind
from ..errors import ConfigError, ModelError
from ..policy.quantization import is_quantized
from ..records import BoundRecord
from .config import TrustKLPPOConfig
from .unsupported import sharding_error

logger = logging.get_logger(__name__)

MISMATCH = 0.05
"""Nats per token between sampler and training pass, ten times what rounding makes."""

_GRADIENT_WARNINGS = {
    "biased": "its gradient is that of something else than the KL divergence, so the run settles somewhere else too",
    "partial": "its gradient is only a part of the KL divergence's: it leaves out the cost of this token or of later ones",
}


def check_arguments(
    args: Any, model: Any, ref_model: Any, train_dataset: Any, reward_model: Any, reward_funcs: Any
) -> None:
    """Which arguments of the trainer there have to be, and which exclude each other."""
    if not isinstance(args, TrustKLPPOConfig):
        raise ConfigError(f"`args` got {type(args).__name__}; it must be a TrustKLPPOConfig.")
    if model is None or train_dataset is None:
        raise ConfigError(f"`{'model' if model is None else 'train_dataset'}` got None; it is required.")
    if ref_model is model and not isinstance(model, str):
        raise ModelError("`ref_model` is the model itself; give a copy, or None and the trainer makes the reference.")
    if reward_model is not None and reward_funcs is not None:
        raise ConfigError("`reward_model` and `reward_funcs` were both given; put the model into `reward_funcs`.")


def reject_sharding(*, deepspeed: bool, fsdp: bool) -> None:
    """NotAvailableYetError for an accelerator that shards, whoever set it up so."""
    if deepspeed or fsdp:
        raise sharding_error("DeepSpeed" if deepspeed else "FSDP")


class BatchSizes(NamedTuple):
    """Responses of one update on one process (`local`) and on all of them (`batch`); `updates` of the run."""

    local: int
    batch: int
    updates: int


def set_batch_sizes(args: TrustKLPPOConfig, *, rows: int, processes: int) -> BatchSizes:
    """Set the fields of `args` that follow from others, from the rows of the dataset and the number of processes."""
    args.world_size = processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * processes
    args.batch_size = args.local_batch_size * processes
    args.check_horizons(args.batch_size)
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.mini_batch_size = args.local_mini_batch_size * processes
    if args.total_episodes is None:
        args.total_episodes = math.ceil(args.num_train_epochs * rows)
    args.num_total_batches = args.max_steps if args.max_steps > 0 else math.ceil(args.total_episodes / args.batch_size)
    return BatchSizes(args.local_batch_size, args.batch_size, args.num_total_batches)


def micro_batch_size(args: TrustKLPPOConfig) -> int:
    """The rows of a micro-batch: they divide a mini-batch evenly, so that any micro-batch can go into any mini-batch."""
    mini = args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_mini_batches
    sizes = range(1, min(args.per_device_train_batch_size, mini) + 1)
    return max(size for size in sizes if mini % size == 0)


def place(models: Iterable[nn.Module | None], device: torch.device) -> None:
    """Move the models that are not trained to their device; quantised ones are there already."""
    for model in models:
        if model is not None and not is_quantized(model):
            model.to(device)


def warn_of_gradient(args: TrustKLPPOConfig) -> None:
    """Say once, in plain words, that an anchor does not pull the way its name suggests."""
    kind = gradient_kind(args.kl_estimator, args.kl_placement)
    if args.anchored and kind in _GRADIENT_WARNINGS:
        logger.warning(
            f"kl_estimator={args.kl_estimator!r} with kl_placement={args.kl_placement!r} is a {kind} anchor: "
            f"{_GRADIENT_WARNINGS[kind]}. kl_estimator='k1' with kl_placement='reward', and 'exact' with 'both', pull the way "
            "the KL divergence does. The record's anchor/gradient says which kind a run used."
        )


def warn_of_sampler(record: BoundRecord, args: TrustKLPPOConfig) -> bool:
    """Say that responses are not the policy's, where nothing that was asked for explains it; returns whether it did."""
    kl = record.sampler.kl
    if kl is None or not kl > MISMATCH or args.generation_kwargs:
        return False
    logger.warning(
        f"update {record.update}: `model` says other things when it generates than when it is trained, by "
        f"{kl:.3g} nats per token (sampler/kl): the responses are not its own, and no gradient of them is right. Some "
        "architectures mistake padding for text, in one of the two or in both: give prompts of one length, or set "
        "per_device_train_batch_size=1 and local_rollout_forward_batch_size=1. With bf16=True, try bf16=False."
    )
    return True
