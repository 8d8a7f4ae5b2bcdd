"""The hard limits of one update, and their enforcement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ConfigError
from ..types import Enforcement, Measurement, Snapshot
from .backtracking import backtrack

HARD_LIMITS = ("trust_max_kl", "trust_max_kl_token", "trust_max_kl_response", "anchor_max_kl")
"""The limits that backtracking holds, by their fields in a configuration."""


class Limits(NamedTuple):
    """Limits of an update on the contexts of its batch; None disables one. All but `panic_kl` are held by backtracking.

    max_kl: of the mean KL(π_old‖π), in nats per token. panic_kl: of the same; an update that exceeds it before any
    backtracking is rolled back. max_kl_token: of the largest KL(π_old‖π) of one token, in nats. max_kl_response: of the
    largest sum of it over one response, in nats. anchor_max_kl: of KL(π‖π_ref), in nats per response, the mean of the sums;
    if it is above before the update already, it must not grow.
    """

    max_kl: float | None = None
    panic_kl: float | None = None
    max_kl_token: float | None = None
    max_kl_response: float | None = None
    anchor_max_kl: float | None = None

    @property
    def hard(self) -> bool:
        """Whether any limit is held by backtracking."""
        return any(limit is not None for limit in self._replace(panic_kl=None))

    def anchor_limit(self, found: Measurement) -> float | None:
        """`anchor_max_kl`, or the KL(π_old‖π_ref) of the batch where that is larger."""
        if self.anchor_max_kl is None:
            return None
        assert found.anchor_start is not None, "the batch was measured without its reference"
        return max(self.anchor_max_kl, found.anchor_start)

    def used(self, found: Measurement) -> dict[str, float]:
        """What was measured, as a share of each limit that is held by backtracking, by the name of its field: above 1 if and
        only if the limit is exceeded, infinite for a value that is not finite."""
        pairs = (
            (found.kl, self.max_kl),
            (found.kl_max, self.max_kl_token),
            (found.kl_response_max, self.max_kl_response),
            (found.anchor_kl, self.anchor_limit(found)),
        )
        return {
            name: _share(value, limit)
            for name, (value, limit) in zip(HARD_LIMITS, pairs, strict=True)
            if value is not None and limit is not None
        }

    def exceeds(self, found: Measurement) -> tuple[bool, bool, float]:
        """By how much a measurement exceeds the limits, for a comparison of several: whether its KL is not finite, whether it
        is above `panic_kl`, and the largest of `used`."""
        panics = self.panic_kl is not None and found.kl > self.panic_kl
        return not math.isfinite(found.kl), panics, max(self.used(found).values(), default=0.0)


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

        All limits are held by one search along the path of the update, on the largest of `Limits.used`.

        Args:
            snapshot: the state before the update. Several updates may be enforced in turn with the same snapshot.
            measure: measures the batch under the current parameters. It must return the same on every process, because
                each process decides by itself.
            proposed: the result of `measure` before enforcement.
            rejected: the reason if the update was already rolled back, else None.
        """
        limits = self.limits
        if (reason := self._reason_to_reject(proposed)) is not None:
            snapshot.restore()
        if reason is not None or rejected is not None:
            measured = proposed if reason is None else measure()
            return self._result(proposed, 0.0, measured, rejected=reason or rejected)
        exceeded = max(limits.used(proposed).values(), default=0.0)
        if exceeded <= 1.0:
            return self._result(proposed, 1.0, proposed)
        tried, at = {1.0: proposed}, 1.0

        def set_scale(scale: float) -> None:
            nonlocal at
            at = scale
            snapshot.path.set_scale(scale)

        def largest_share() -> float:
            tried[at] = measure()
            return max(limits.used(tried[at]).values())

        snapshot.path.set_end()
        found = backtrack(set_scale, largest_share, 1.0, proposed=exceeded, start=self._share_before(proposed))
        stopped_by = limits.used(tried[min(scale for scale in tried if scale > found.scale)])
        kept = tried.get(found.scale) or measure()
        decided = max(stopped_by, key=stopped_by.__getitem__)
        return self._result(proposed, found.scale, kept, tries=found.tries, decided=decided)

    def _result(
        self, proposed: Measurement, scale: float, measured: Measurement, *, tries: int = 0,
        rejected: str | None = None, decided: str | None = None,
    ) -> Enforcement:  # fmt: skip
        limits = self.limits
        return Enforcement(
            proposed.kl, scale if limits.hard else None, tries, limits.max_kl, measured, rejected,
            limit_token=limits.max_kl_token, limit_response=limits.max_kl_response,
            limit_anchor=limits.anchor_limit(proposed), decided=decided,
        )  # fmt: skip

    def _share_before(self, proposed: Measurement) -> float:
        """The largest of `used` at scale 0, where only the KL to the reference is not 0."""
        limit = self.limits.anchor_limit(proposed)
        return 0.0 if limit is None or proposed.anchor_start is None else _share(proposed.anchor_start, limit)

    def _reason_to_reject(self, proposed: Measurement) -> str | None:
        limits = self.limits
        if not math.isfinite(proposed.kl):
            return "the KL(π_old‖π) measured after it is not finite"
        if limits.panic_kl is not None and proposed.kl > limits.panic_kl:
            return f"its KL(π_old‖π) of {proposed.kl:.3g} nats per token is above panic_kl = {limits.panic_kl:g}"
        if limits.anchor_max_kl is not None and not math.isfinite(proposed.anchor_start or 0.0):
            return "the KL(π_old‖π_ref) measured before it is not finite"
        return None


def reject_moving_reference(limit: float | None, *, moves: bool) -> None:
    """ConfigError for a limit on the KL to a reference that is renewed during the run."""
    if limit is not None and moves:
        raise ConfigError(
            f"`anchor_max_kl` got {limit:g} with sync_ref_model=True, which moves the reference: the limit would not hold for "
            "any fixed policy. Leave sync_ref_model False, or anchor_max_kl None."
        )


def blocked_at_the_anchor(limit: float, fix: str) -> str:
    """A warning about a limit on KL(π‖π_ref), in nats per response, that no controller keeps the KL below."""
    return (
        f"`anchor_max_kl` got {limit:g} without a controller whose target is below it: once the KL to the reference is at the "
        f"limit, updates that would increase it are blocked, and training may stop there. Set {fix}, which lowers the KL by "
        "the penalty."
    )


def _share(value: float, limit: float) -> float:
    """Above 1 if and only if the value is above the limit: a quotient of two neighbouring floats is not rounded to 1."""
    if math.isnan(value):
        return math.inf
    return value / limit if limit else math.inf if value > 0 else 0.0
