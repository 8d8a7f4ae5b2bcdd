"""What an update would have done without a mechanism: it is rerun from its start with the mechanism off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..run import rng
from ..types import Restorable


class ReplayPoint:
    """A state that the steps of an update can be rerun from, and that can be put back afterwards: parameters and optimizer,
    the gradient scaler, and the random states of this process.

    Args:
        snapshots: of the parameters and the state of their optimizer.
        scaler: the gradient scaler of fp16, or None.
    """

    def __init__(self, snapshots: Sequence[Restorable], scaler: Any) -> None:
        self._snapshots = snapshots
        self._scaler = scaler
        self._scaling = None if scaler is None else copy.deepcopy(scaler.state_dict())
        self._random_states = rng.capture()

    def restore(self) -> None:
        """Restore everything bit for bit, and clear the gradients."""
        for snapshot in self._snapshots:
            snapshot.restore()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scaling)
        rng.restore(self._random_states)


def kl_without(
    mechanisms: Iterable[str], rerun: Callable[[str], float], *, start: Restorable, end: Restorable
) -> dict[str, float | None]:
    """The KL(π_old‖π) of an update without each of the mechanisms, in nats per token; None where it is not finite.

    Args:
        mechanisms: their names.
        rerun: makes the update from its start without a mechanism, and returns its KL, the same on every process.
        start: the state before the first step.
        end: the state after the update, which is restored at the end, also after an error.
    """
    found = {}
    try:
        for name in mechanisms:
            start.restore()
            kl = rerun(name)
            found[name] = kl if math.isfinite(kl) else None
    finally:
        end.restore()
    return found
