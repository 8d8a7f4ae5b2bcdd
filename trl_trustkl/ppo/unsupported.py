"""What transformers and TRL offer and this version rejects: fields, sharding, callbacks, some optimizers and schedules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from peft import PeftModel
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode

from ..errors import ConfigError, NotAvailableYetError, out_of_range, shown
from ..policy.quantization import is_quantized
from ..policy.reference import trained_outside_adapters
from ..trl_compat.trl_trainers import steps_in_backward
from ..trust.gradient_scale import KNOWN

_KERNELS = (
    "scoring, stepping and measuring have to compute the same numbers. "
    "generation_kwargs={'cache_implementation': 'static', 'compile_config': {}} compiles sampling alone"
)

REJECTED = {
    "torch_compile": _KERNELS,
    "torch_compile_backend": _KERNELS,
    "torch_compile_mode": _KERNELS,
    "use_liger_kernel": "log-probabilities and exact KLs are computed in chunks here, without [B, T, V] logits in memory",
    "liger_kernel_config": "it configures `use_liger_kernel`, which is not available either",
    "parallelism_config": "one process, or several with DDP or FSDP2, work",
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


SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of `optim` whose moments are sharded as the parameters are."""


def reject_unsupported(args: Any) -> None:
    """Raise NotAvailableYetError for a configuration that asks for one of them; before transformers reads it."""
    reject_deepspeed(args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))
    if _asks_for_fsdp(args) and args.use_cpu:
        raise NotAvailableYetError(
            "`use_cpu` got True with FSDP, which accelerate would ignore: each process would train a complete model. Leave "
            "`use_cpu` out, or start the run without FSDP (examples/accelerate/cpu_gloo.yaml)."
        )
    for name, why in REJECTED.items():
        value = getattr(args, name, None)
        if value is not None and (value not in _ON_UNLESS[name] if name in _ON_UNLESS else value):
            raise NotAvailableYetError(
                f"`{name}` got {shown(value)}, which is not available in this version; leave it out: {why}."
            )
    accelerator = args.accelerator_config
    if accelerator is not None and not isinstance(accelerator, (AcceleratorConfig, dict, str, os.PathLike)):
        valid = "an AcceleratorConfig, a dict, JSON, the path of a JSON file, or None"
        raise out_of_range("accelerator_config", accelerator, valid)
    _reject_launcher()
    _reject_optimizers(args)


def reject_deepspeed(used: Any) -> None:
    """Raise NotAvailableYetError where it is on."""
    if used:
        raise NotAvailableYetError(
            "DeepSpeed is not available yet in this version; use FSDP2 (fsdp_version: 2), which shards the same tensors as "
            "ZeRO-3: accelerate launch --config_file examples/accelerate/fsdp2.yaml. One process and several with DDP "
            "(multi_gpu.yaml, cpu_gloo.yaml without a GPU) work too."
        )


def reject_fsdp_options(args: Any) -> None:
    """Raise an error for what FSDP2 does not support here; after transformers has read the configuration."""
    if not _asks_for_fsdp(args):
        return
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ConfigError(
            f"`fsdp` got {shown(args.fsdp)} in a run of one process, which has nothing to shard over; start several with "
            "accelerate launch or torchrun, or leave `fsdp` out."
        )
    given = getattr(args, "fsdp_plugin_args", None) or {}
    if (version := int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))) != 2:
        raise NotAvailableYetError(
            f"`fsdp_version` got {version}; only 2 is available. Set fsdp_version: 2 in accelerate's "
            "configuration, or fsdp_config={'version': 2}."
        )
    plugin = FullyShardedDataParallelPlugin(**given)
    generation = args.arguments("generation_kwargs")
    optimizer = str(getattr(args.optim, "value", args.optim))
    policy = getattr(plugin.auto_wrap_policy, "__name__", "NO_WRAP")
    for name, got, works, fix in (
        ("fsdp_offload_params", True, not isinstance(plugin.cpu_offload, CPUOffloadPolicy), "leave it false"),
        ("fsdp_activation_checkpointing", True, not plugin.activation_checkpointing, "set gradient_checkpointing=True instead"),
        ("fsdp_auto_wrap_policy", policy, policy == "transformer_auto_wrap_policy", "use TRANSFORMER_BASED_WRAP"),
        ("fp16", True, not args.fp16, "use bf16=True, or float32"),
        ("optim", optimizer, optimizer in SHARDED_OPTIMIZERS, f"use one of {', '.join(SHARDED_OPTIMIZERS)}"),
        ("sync_ref_model", True, not args.sync_ref_model, "leave it False"),
        ("use_vllm", True, not args.use_vllm, "leave it False: responses are sampled with the gathered weights"),
        ("generation_kwargs", generation, not {"cache_implementation", "compile_config"} & generation.keys(),
         "leave out cache_implementation and compile_config: gathered weights change their place in memory"),
    ):  # fmt: skip
        if not works:
            raise NotAvailableYetError(f"`{name}` got {shown(got)}, which is not available with FSDP2; {fix}.")


def reject_unsharded(models: dict[str, Any], optimizer: Any, engine: Any) -> None:
    """Raise NotAvailableYetError for a model (by its argument), an optimizer or an engine that cannot be used with shards."""
    for name, model in models.items():
        if model is not None and is_quantized(model):
            raise NotAvailableYetError(
                f"`{name}` is quantised, which is not available with FSDP2; load it without quantization_config, or start the "
                "run with DDP (examples/accelerate/multi_gpu.yaml)."
            )
    policy = models["model"]
    if isinstance(policy, PeftModel) and (outside := trained_outside_adapters(policy)):
        raise NotAvailableYetError(
            f"`peft_config` trains {next(iter(outside))!r}, which is not in the adapter; this is not available with FSDP2. "
            "Leave the bias at 'none'."
        )
    if optimizer is not None and type(optimizer) not in KNOWN:
        raise NotAvailableYetError(
            f"`optimizers` got a {type(optimizer).__name__}, which is not available with FSDP2; use torch.optim.AdamW, Adam or "
            "SGD."
        )
    if engine is not None:
        raise NotAvailableYetError(
            f"`rollout_engine` got a {type(engine).__name__}, which is not available with FSDP2: the weights for it are not "
            "gathered. Leave it None."
        )


def _asks_for_fsdp(args: Any) -> bool:
    return bool(args.fsdp) or bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


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


def _reject_launcher() -> None:
    """What a launcher asks for in the environment."""
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise NotAvailableYetError(
            f"accelerate's `dynamo_backend` is not available yet in this version; leave it at no: {_KERNELS}."
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise NotAvailableYetError(
            "accelerate's `parallelism_config` is not available yet in this version; leave it out: "
            f"{REJECTED['parallelism_config']}."
        )


def reject_accelerator_config(given: Any) -> None:
    """Raise NotAvailableYetError for what transformers' `AcceleratorConfig` changes about the batches."""
    for name in ("split_batches", "gradient_accumulation_kwargs"):
        if value := getattr(given, name):
            raise NotAvailableYetError(
                f"`accelerator_config` got {name}={shown(value)}, which is not available in this version; leave it out, and "
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
            f"`optim` got {optimizer!r}, which is not available in this version: it {why}. Use 'adamw_torch', or "
            "'adamw_8bit' or 'adafactor' for less memory."
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise NotAvailableYetError(
            f"`lr_scheduler_type` got {schedule!r}, which is not available in this version: schedules step once in every "
            "update. Use another, such as 'linear', or `trust_lr_target`: it moves the learning rate by the KL of the updates."
        )
