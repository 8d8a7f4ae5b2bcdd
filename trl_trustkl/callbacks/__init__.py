"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient."""

from .adaptive import AdaptiveKLCallback
from .report import BoundReportCallback

__all__ = ["AdaptiveKLCallback", "BoundReportCallback"]
