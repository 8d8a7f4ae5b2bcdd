"""A trust region for TRL's GRPO, RLOO and PPO, measured and enforced at every update, beside the KL penalty.

The mathematics (`divergences`, `controllers`, `surrogates`, `trust_region`, …) only needs torch; modules that need TRL are
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import controllers, divergences, surrogates, trust_region
from .records import load_records

if TYPE_CHECKING:
    from .callbacks import AdaptiveKLCallback, BoundReportCallback, TrustRegionCallback
    from .grpo.config import TrustKLGRPOConfig, TrustKLRLOOConfig
    from .grpo.trainer import TrustKLGRPOTrainer, TrustKLRLOOTrainer
    from .ppo.config import TrustKLPPOConfig
    from .ppo.trainer import TrustKLPPOTrainer

__version__ = "0.2.0"

_LAZY = {
    "AdaptiveKLCallback": ".callbacks", "BoundReportCallback": ".callbacks",
    "TrustRegionCallback": ".callbacks",
    "TrustKLGRPOConfig": ".grpo.config", "TrustKLRLOOConfig": ".grpo.config",
    "TrustKLGRPOTrainer": ".grpo.trainer", "TrustKLRLOOTrainer": ".grpo.trainer",
    "TrustKLPPOConfig": ".ppo.config", "TrustKLPPOTrainer": ".ppo.trainer",
}  # fmt: skip

__all__ = [
    "AdaptiveKLCallback", "BoundReportCallback", "TrustKLGRPOConfig", "TrustKLGRPOTrainer", "TrustKLPPOConfig",
    "TrustKLPPOTrainer", "TrustKLRLOOConfig", "TrustKLRLOOTrainer",
    "TrustRegionCallback", "controllers", "divergences", "load_records", "surrogates", "trust_region",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
