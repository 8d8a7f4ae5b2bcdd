"""Callbacks for TRL's trainers: the records of a run, and controllers of the KL coefficient."""

from .report import BoundReportCallback

__all__ = ["BoundReportCallback"]
