"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient."""

from .adaptive_kl import AdaptiveKLCallback
from .bound_report import BoundReportCallback
from .trust_region import TrustRegionCallback

__all__ = ["AdaptiveKLCallback", "BoundReportCallback", "TrustRegionCallback"]
