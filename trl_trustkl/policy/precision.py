"""The precision on a CPU; without bf16 instructions, bf16 takes minutes for what float32 does in seconds."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available, logging

from ..parallel.options import engine_of
from . import cpu
from .quantization import is_quantized

logger = logging.get_logger(__name__)

_WITHOUT = "this CPU has no avx512_bf16 instructions, and bf16 is very slow without them"


def is_slow_in_bf16(args: TrainingArguments) -> bool:
    """Whether the run is on a CPU, and that CPU has no bf16 instructions."""
    return bool(args.use_cpu or not torch.accelerator.is_available()) and not cpu.has_bf16_instructions()


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() or is_torch_xla_available()


def choose_bf16(args: TrainingArguments) -> None:
    """Set a `bf16` of None to False where bf16 is slow, and warn about True there. Elsewhere TRL makes None True, which
    transformers rejects without a GPU unless `use_cpu` is set: set it then.

    For a configuration's `__post_init__`, before TRL's.
    """
    if args.fp16 or args.bf16 is False:
        return
    if not is_slow_in_bf16(args):
        alone = os.environ.get("WORLD_SIZE", "1") == "1" and engine_of(args) is None
        if args.bf16 is None and not args.use_cpu and alone and not _has_accelerator():
            args.use_cpu = True
            logger.warning_once(
                "`use_cpu` is True: torch finds no GPU. Set use_cpu=True to train on the CPU without this line."
            )
    elif args.bf16 is None:
        args.bf16 = False
        logger.warning_once(f"`bf16` is False: {_WITHOUT}. Set bf16=True to train in bf16 anyway.")
    else:
        logger.warning_once(f"`bf16` got {args.bf16!r}, but {_WITHOUT}. Leave it out to train in float32.")


def dtype_to_load(args: TrainingArguments) -> dict[str, Any]:
    """The dtype of models given by name, as an argument of `from_pretrained`: float32 where bf16 is slow, else none, which
    is the checkpoint's."""
    return {"dtype": torch.float32} if is_slow_in_bf16(args) else {}


def avoid_bf16(model: Any, args: TrainingArguments, *, name: str = "model") -> None:
    """Where bf16 is slow and not asked for: let a quantised model compute in float32, and warn about another's bf16 weights.

    A quantised model's weights are neither trained nor saved, so that only the precision of its passes changes.
    """
    if args.bf16 or not isinstance(model, nn.Module) or not is_slow_in_bf16(args):
        return
    layers: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) == torch.bfloat16]
    weights = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    if weights and not is_quantized(model):
        logger.warning_once(f"`{name}` has weights in bf16, but {_WITHOUT}. Load it with dtype=torch.float32.")
    elif weights or layers:
        logger.warning_once(
            f"`{name}` is quantised and computes in float32 instead of bf16: {_WITHOUT}. Set bf16=True to keep it in bf16."
        )
        for weight in weights:
            weight.data = weight.data.float()
        for layer in layers:
            layer.compute_dtype = torch.float32


def sampling_dtype(causal: nn.Module, args: TrainingArguments) -> torch.dtype:
    """The dtype of the training pass's matrix products, for an engine that samples elsewhere."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    found: list[Any] = [m.compute_dtype for m in causal.modules() if getattr(m, "compute_dtype", None) is not None]
    weights = [p.dtype for p in causal.parameters() if p.dtype.is_floating_point]
    return (found or weights)[0]
