"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient.

Imports `report`, `run`, `trust` and what is below them; knows nothing of the PPO trainer.
"""

from .adaptive_kl import AdaptiveKLCallback
from .bound_report import BoundReportCallback

__all__ = ["AdaptiveKLCallback", "BoundReportCallback"]
