"""The engines that shard the parameters of a run over its processes, and the models that they are given."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from packaging.version import Version
from torch import nn

from ..errors import ConfigError, NotAvailableYetError
from .fsdp2 import FSDP2, load_missing
from .sharding import REPLICATED, Replicated
from .zero import ZeRO, complete_model

DEEPSPEED = ("0.19.8", "0.20")
"""The versions of DeepSpeed that are accepted: from the first, which was tested, and below the second."""


def check_deepspeed() -> None:
    """Raise ConfigError if DeepSpeed is not installed, and NotAvailableYetError for a version that was not tested."""
    lowest, limit = DEEPSPEED
    fix = f"pip install 'deepspeed>={lowest},<{limit}'"
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"DeepSpeed is not installed: {fix}.") from None
    if not Version(lowest) <= Version(version) < Version(limit):
        raise NotAvailableYetError(
            f"DeepSpeed {version} is not available; its internals may differ from those of {lowest}, which was tested: {fix}."
        )


def build_sharding(accelerator: Accelerator, *, saves: bool) -> Replicated:
    """The sharding that accelerate was configured with. saves: whether this process saves the model and checkpoints."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        return FSDP2(saves=saves, reshards=bool(plugin.reshard_after_forward))
    if kind == DistributedType.DEEPSPEED:
        return ZeRO(accelerator, saves=saves)
    return REPLICATED


def load_everywhere(model: Any) -> None:
    """Give the model's weights to the processes that have not loaded them.

    While a configuration of ZeRO-3 exists, transformers gives each process a part of every weight. With accelerate's
    `fsdp_cpu_ram_efficient_loading`, it loads them on the first process of a machine alone, and leaves those of the others on
    the meta device. The passes that check a model before it is sharded need them everywhere.
    """
    if isinstance(model, nn.Module):
        complete_model(model)
        load_missing(model)
