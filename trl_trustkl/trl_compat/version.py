"""The only file that depends on the installed version of TRL.

TRL up to 1.12 has PPO under `trl.experimental.ppo`; TRL 1.13 removed it, and `ppo_base.py` replaces it. A type checker
reads the latter whichever is installed.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ppo_base import PPOConfig, PPOTrainer
else:
    with warnings.catch_warnings():
        # TRL warns that anything under `trl.experimental` may change; the tests run on both versions.
        warnings.simplefilter("ignore")
        try:
            from trl.experimental.ppo import PPOConfig, PPOTrainer
        except ImportError:
            from .ppo_base import PPOConfig, PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
