"""The options of DDP, which transformers 5.0 sets only in its own training loop."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedDataParallelKwargs


def set_ddp_options(accelerator: Any, args: Any) -> None:
    """Set those of the fields `ddp_*` that were given, unless transformers did so when it built the accelerator."""
    names = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
    given = {name: getattr(args, f"ddp_{name}", None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if accelerator.ddp_handler is None and given:
        accelerator.ddp_handler = DistributedDataParallelKwargs(**given)
