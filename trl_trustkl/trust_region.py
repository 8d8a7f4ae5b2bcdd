"""The trust region KL(π_old‖π): what an update moved, and the path back to where it began. Needs torch alone."""

from __future__ import annotations

from .trust.backtracking import Backtrack, backtrack
from .trust.measurement import QUANTILES, measurement
from .trust.snapshot import ParameterPath

__all__ = ["QUANTILES", "Backtrack", "ParameterPath", "backtrack", "measurement"]
