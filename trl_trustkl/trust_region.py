"""The trust region KL(π_old‖π): its measurement, and backtracking along the path to θ_old. Needs only torch."""

from __future__ import annotations

from .trust.backtracking import Backtrack, backtrack
from .trust.measurement import QUANTILES, measurement
from .trust.snapshot import ParameterPath

__all__ = ["QUANTILES", "Backtrack", "ParameterPath", "backtrack", "measurement"]
