"""The hard limits of one update, and their enforcement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..types import Enforcement, Measurement, Snapshot
from .backtracking import backtrack


class Limits(NamedTuple):
    """Limits of the mean KL(π_old‖π) of a batch, in nats per token; None disables one.

    max_kl: enforced by backtracking. panic_kl: an update that exceeds it before any backtracking is rolled back.
    """

    max_kl: float | None = None
    panic_kl: float | None = None


class TrustRegion:
    """Enforces `limits` on an update after its last step, for any trainer."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def enforce(
        self,
        snapshot: Snapshot,
        measure: Callable[[], Measurement],
        proposed: Measurement,
        *,
        rejected: str | None = None,
    ) -> Enforcement:
        """Roll the update back, shorten it, or keep it; the result says which, with the measurement afterwards.

        Args:
            snapshot: the state before the update. Several updates may be enforced in turn with the same snapshot.
            measure: measures the batch under the current parameters. It must return the same on every process, because
                each process decides by itself.
            proposed: the result of `measure` before enforcement.
            rejected: the reason if the update was already rolled back, else None.
        """
        limit = self.limits.max_kl
        if (reason := self._reason_to_reject(proposed)) is not None:
            snapshot.restore()
        if reason is not None or rejected is not None:
            measured = proposed if reason is None else measure()
            scale = None if limit is None else 0.0
            return Enforcement(proposed.kl, scale, 0, limit, measured, reason or rejected)
        if limit is None or proposed.kl <= limit:
            return Enforcement(proposed.kl, None if limit is None else 1.0, 0, limit, proposed)
        tried = [proposed]

        def kl() -> float:
            tried.append(measure())
            return tried[-1].kl

        snapshot.path.set_end()
        found = backtrack(snapshot.path.set_scale, kl, limit, proposed=proposed.kl)
        kept = next((each for each in tried if each.kl == found.measured), None) or measure()
        return Enforcement(proposed.kl, found.scale, found.tries, limit, kept)

    def _reason_to_reject(self, proposed: Measurement) -> str | None:
        if not math.isfinite(proposed.kl):
            return "the KL(π_old‖π) measured after it is not finite"
        panic = self.limits.panic_kl
        if panic is not None and proposed.kl > panic:
            return f"its KL(π_old‖π) of {proposed.kl:.3g} nats per token is above panic_kl = {panic:g}"
        return None
