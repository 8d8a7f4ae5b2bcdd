"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient.

Does not depend on the PPO trainer: imports only `report`, `run`, `trust` and the layers below them.
"""

from .adaptive_kl import AdaptiveKLCallback
from .bound_report import BoundReportCallback
from .trust_region import TrustRegionCallback

__all__ = ["AdaptiveKLCallback", "BoundReportCallback", "TrustRegionCallback"]
