"""What a TrustRegionCallback cannot work with, as errors at its construction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError, NotAvailableYetError, is_finite, out_of_range, shown, unknown_name
from ..parallel.engines import check_deepspeed
from ..parallel.options import Option, deepspeed_options, fsdp_options, optimizer_option
from ..parallel.processes import Processes
from ..policy.loading import trainable
from ..trl_compat import generation, trl_logs
from ..trl_compat.trl_logs import Kind
from ..trl_compat.trl_trainers import GenerationTrainer, steps_in_backward
from ..trust.limits import Limits, reject_moving_reference

EVERY = ("generation", "step")
REPLAYING = ("GRPOWithReplayBufferTrainer",)
"""Subclasses of TRL's trainers, by name, that train on responses of earlier generation batches."""


UNITS = {"max_kl_token": "nats", "max_kl_response": "nats per completion", "anchor_max_kl": "nats per completion"}
"""Of the limits that are not in nats per token."""


def check_options(limits: dict[str, Any], every: Any, anchor: Any) -> None:
    """ConfigError for a limit that is not a positive number, or another option of a wrong value."""
    for name, value in limits.items():
        if value is not None and not (is_finite(value) and value > 0):
            unit = UNITS.get(name, "nats per token")
            raise out_of_range(name, value, f"a positive number of {unit}, or None", "None turns it off.")
    if every not in EVERY:
        raise unknown_name("every", every, EVERY)
    if not isinstance(anchor, bool):
        raise out_of_range("anchor", anchor, "True or False")
    if every == "step" and all(limits.get(name) is None for name in Limits._fields):
        raise ConfigError(
            "`every` got 'step' without a limit to enforce after each step; set max_kl or panic_kl, or leave "
            "every='generation'."
        )


def check_anchor_limit(limit: float | None, trainer: Any, *, measured: bool) -> None:
    """ConfigError for a limit on the KL to a reference that does not exist, is not measured, or is moved."""
    reject_moving_reference(limit, moves=getattr(trainer.args, "sync_ref_model", False))
    if limit is not None and not measured:
        raise ConfigError(
            f"`anchor_max_kl` got {limit:g} without a reference: with beta={trainer.beta:g} and no adapter TRL loads none, and "
            "with anchor=False it is not measured. Set a small beta, such as beta=1e-12, or train an adapter (`peft_config`), "
            "and leave anchor True."
        )


def checked_kind(trainer: Any) -> Kind:
    """The trainer's kind. ConfigError for one that the callback cannot work with."""
    name, args = type(trainer).__name__, getattr(trainer, "args", None)
    if trl_logs.writes_records(args):
        raise ConfigError(
            f"`trainer` got a {name}, which has its own trust region. Set trust_max_kl, trust_stop, trust_lr_target or "
            "panic_kl in its TrustKLPPOConfig instead."
        )
    kind = trl_logs.kind_of(args)
    if kind not in ("grpo", "rloo") or not generation.generates(trainer):
        instead = " For PPO, use TrustKLPPOTrainer with trust_max_kl." if kind == "ppo" else ""
        raise ConfigError(
            f"`trainer` got a {name}; it must be TRL's GRPOTrainer or RLOOTrainer, or a subclass of these such as GMPOTrainer: "
            f"TrustRegionCallback reads their generation batches.{instead}"
        )
    if any(each.__name__ in REPLAYING for each in type(trainer).__mro__):
        raise ConfigError(
            f"`trainer` got a {name}, whose batches have responses of earlier policies: the last update cannot be measured "
            "on them. Use GRPOTrainer."
        )
    for option in engine_options(trainer):
        if not option.works:
            raise NotAvailableYetError(
                f"`{option.name}` got {shown(option.got)}, which is not available for a {name} with a TrustRegionCallback; "
                f"{option.fix}."
            )
    if steps_in_backward(trainer.args):
        raise ConfigError(
            f"`trainer` got a {name} with an optimizer that steps within the backward pass (`optim`), where no update can be "
            "measured. Use 'adamw_torch', or 'adamw_8bit' or 'adafactor' for less memory."
        )
    if (where := generation.images(trainer)) is not None:
        raise ConfigError(f"`train_dataset` has {where}, {generation.NO_IMAGES}.")
    if not trainable(trainer.model):
        raise ConfigError(
            f"`trainer` got a {name} whose model has no trainable parameter; there is no update to limit."
        )
    return kind


def check_reference(trainer: GenerationTrainer, processes: Processes) -> None:
    """ConfigError on all processes for a reference without weights on one of them."""
    reference = trainer.ref_model
    if processes.any(reference is not None and any(p.is_meta for p in reference.parameters())):
        raise ConfigError(
            "`trainer` has a reference whose weights only the first process of a machine has loaded, and TRL shards it without "
            "them. Set fsdp_cpu_ram_efficient_loading: false, train an adapter (`peft_config`), or set beta=0."
        )


def engine_options(trainer: Any) -> Iterator[Option]:
    """The options of the engine that shards the parameters of a trainer, and the fields that it restricts."""
    state, args = trainer.accelerator.state, trainer.args
    if trainer.is_fsdp_enabled:
        yield from fsdp_options(state.fsdp_plugin, state.fsdp_plugin.fsdp_version)
    if trainer.is_deepspeed_enabled:
        check_deepspeed()
        yield from deepspeed_options(state.deepspeed_plugin.deepspeed_config)
        yield optimizer_option(args)
        fix = "leave it False: DeepSpeed makes a step before its update can be limited, and this saves in between"
        yield Option("enable_jit_checkpoint", True, not args.enable_jit_checkpoint, fix)


def check_stop(stop: float, trainer: GenerationTrainer) -> None:
    """ConfigError for a trainer in which an early stop has no effect, or whose steps cannot be dropped."""
    args = trainer.args
    steps = f"num_iterations={args.num_iterations}, steps_per_generation={args.steps_per_generation} and "
    steps += f"gradient_accumulation_steps={args.gradient_accumulation_steps}"
    if generation.steps_are_shared(trainer):
        raise ConfigError(
            f"`stop` got {stop:g} with {steps}, after {generation.passes(trainer)} passes: an optimizer step then uses two "
            "generation batches, of which it cannot drop one. Make one of steps_per_generation × num_iterations and "
            "gradient_accumulation_steps a multiple of the other, build a new trainer if train() was interrupted in the "
            "middle of a step, or use max_kl."
        )
    if generation.passes_per_generation(trainer) <= args.gradient_accumulation_steps:
        raise ConfigError(
            f"`stop` got {stop:g} with {steps}: it ends the steps on a generation batch early, and there is only one. Use "
            "max_kl, or num_iterations=2 or more."
        )
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"`stop` got {stop:g} with DeepSpeed, which makes a step within the backward pass, so that none can be dropped; "
            "use max_kl."
        )
    if trainer.accelerator.scaler is not None:
        raise ConfigError(
            f"`stop` got {stop:g} with fp16=True, where a step without gradients fails in the gradient scaler; use bf16=True, "
            "or max_kl."
        )


def not_repeatable(kl: float, model: nn.Module) -> str | None:
    """Why a KL between two passes under the same parameters is too large for a measurement; None if it is not."""
    if math.isfinite(kl) and kl <= 1e-4:
        return None
    return (
        f"two forward passes of {type(model).__name__} over the same tokens under the same parameters differ by a KL of "
        f"{kl:.3g} nats per token, although its dropout is off while measuring: no divergence of an update could be measured. "
        "Set every source of randomness to 0 in the model's configuration."
    )
