"""What FSDP2 and DeepSpeed offer and this version rejects, before a model is loaded or a run begins."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from transformers.training_args import ParallelMode

from ..errors import ConfigError, NotAvailableYetError, shown
from ..parallel.engines import check_deepspeed
from ..parallel.options import Option, check_optimizer, deepspeed_options, engine_of, fsdp_options, optimizer_option
from ..policy.quantization import is_8bit
from ..policy.reference import trained_outside_adapters


def reject_launch(args: Any) -> None:
    """Raise an error for an engine that cannot start; before transformers reads the configuration."""
    engine = engine_of(args)
    if engine is not None and args.use_cpu:
        raise NotAvailableYetError(
            f"`use_cpu` got True with {engine}, which accelerate would ignore: each process would train a complete model. "
            f"Leave `use_cpu` out, or start the run without {engine} (examples/accelerate/cpu_gloo.yaml)."
        )
    if engine == "DeepSpeed":
        check_deepspeed()


def reject_sharding_options(args: Any) -> None:
    """Raise an error for what the engine does not support here; after transformers has read the configuration."""
    engine = engine_of(args)
    if engine is None:
        return
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ConfigError(
            f"{engine} is configured in a run of one process, so parameters cannot be sharded; start several processes with "
            "accelerate launch or torchrun, or leave `fsdp` and `deepspeed` out."
        )
    of_engine = _fsdp_options(args) if engine == "FSDP2" else _deepspeed_options(args)
    for name, got, works, fix in itertools.chain(of_engine, _options(args)):
        if not works:
            raise NotAvailableYetError(f"`{name}` got {shown(got)}, which is not available with {engine}; {fix}.")


def _options(args: Any) -> Iterator[Option]:
    """Fields of the configuration."""
    generation = args.arguments("generation_kwargs")
    yield Option("fp16", True, not args.fp16, "use bf16=True, or float32")
    yield optimizer_option(args)
    yield Option("sync_ref_model", True, not args.sync_ref_model, "leave it False")
    yield Option(
        "generation_kwargs", generation, not {"cache_implementation", "compile_config"} & generation.keys(),
        "leave out cache_implementation and compile_config: the addresses of gathered weights change",
    )  # fmt: skip


def _fsdp_options(args: Any) -> Iterator[Option]:
    given = getattr(args, "fsdp_plugin_args", None) or {}
    version = int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    plugin = FullyShardedDataParallelPlugin(**given) if version == 2 else None  # the version is looked at first
    return fsdp_options(plugin, version)


def _deepspeed_options(args: Any) -> Iterator[Option]:
    config = args.deepspeed_plugin.deepspeed_config
    clipping, precision = config.get("gradient_clipping", "auto"), config.get("bf16", {}).get("enabled", "auto")
    yield from deepspeed_options(config)
    yield Option(
        "gradient_clipping", clipping, clipping in ("auto", 0, args.max_grad_norm),
        "leave it out: `max_grad_norm` limits the norms of the gradients of policy and value",
    )  # fmt: skip
    yield Option(
        "bf16", precision, precision in ("auto", bool(args.bf16)), f"leave it out: `bf16` is {bool(args.bf16)}"
    )


def reject_unsharded(args: Any, models: dict[str, Any], optimizer: Any) -> None:
    """Raise NotAvailableYetError for a model (by its argument) or an optimizer that cannot be used with the engine."""
    engine = engine_of(args)
    for name, model in models.items():
        if engine == "FSDP2" and model is not None and is_8bit(model):
            raise NotAvailableYetError(
                f"`{name}` is quantised to 8 bits, which is not available with FSDP2; load it in 4 bits, without "
                "quantization_config, or start the run with DeepSpeed (examples/accelerate/zero3.yaml) or DDP (multi_gpu.yaml)."
            )
    policy = models["model"]
    if isinstance(policy, PeftModel) and (outside := trained_outside_adapters(policy)):
        raise NotAvailableYetError(
            f"`peft_config` trains {next(iter(outside))!r}, which is not in the adapter; this is not available with {engine}. "
            "Leave the bias at 'none'."
        )
    head = policy.get_output_embeddings()
    if engine == "DeepSpeed" and head is not None and any(head.children()):
        raise NotAvailableYetError(
            "`peft_config` adapts the output head, which is not available with DeepSpeed; leave it out of `target_modules`, or "
            "use FSDP2 (examples/accelerate/fsdp2.yaml)."
        )
    if optimizer is not None:
        check_optimizer(optimizer, str(engine))
