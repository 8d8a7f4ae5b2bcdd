"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient."""

from .adaptive_kl import AdaptiveKLCallback
from .bound_report import BoundReportCallback

__all__ = ["AdaptiveKLCallback", "BoundReportCallback"]
