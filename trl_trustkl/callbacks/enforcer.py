"""Measurement and enforcement of the trust region on the generation batches of GRPO and RLOO."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..parallel.sharding import REPLICATED, Replicated
from ..policy.loading import trainable
from ..policy.observed_lm import ObservedLM
from ..trl_compat.trl_trainers import GenerationTrainer
from ..trust.limits import Limits, TrustRegion
from ..trust.snapshot import ParameterPath, UpdateSnapshot
from ..types import Enforcement, Measurement
from .window import Window

NO_TOKENS = "no token of the generation batch counts, so that its KL(π_old‖π) cannot be measured"


class Enforcer:
    """Measures windows, and holds `limits` on them; without limits it only measures.

    sharding: how the parameters are spread over the processes. reference: a separate reference.
    """

    def __init__(
        self,
        trainer: GenerationTrainer,
        model: ObservedLM,
        limits: Limits,
        *,
        sharding: Replicated = REPLICATED,
        reference: nn.Module | None = None,
    ) -> None:
        self._trainer = trainer
        self._model = model
        self._sharding = sharding
        self._held = [model.model] if reference is None else [model.model, reference]
        self.optimizer: Any = None
        self._path: ParameterPath | None = None
        self._region = TrustRegion(limits)
        self.limited = limits.hard or limits.panic_kl is not None
        self._snapshot: UpdateSnapshot | None = None

    def begin(self) -> None:
        """Use the trainer's model and optimizer as they are, prepared for training."""
        trainer = self._trainer
        self.optimizer = self._sharding.observe(trainer.model_wrapped, trainer.optimizer, trainer.ref_model)

    def take_snapshot(self) -> None:
        """Keep the current state: an update is shortened towards it, or rolled back to it, and π_old is measured in it."""
        trained = trainable(self._trainer.model)
        if self.limited:
            self._snapshot = UpdateSnapshot(trained, [], self.optimizer, self._sharding)
            self._path = self._snapshot.path
        elif self._sharding.steps_in_backward:
            self._path = ParameterPath([self._sharding.local(each) for each in trained], self._sharding.written)

    @contextmanager
    def before_step(self) -> Iterator[None]:
        """The weights from before the step that was just made, where accelerate has made it in the backward pass."""
        path = self._path
        if path is None or not self._sharding.steps_in_backward:
            yield
            return
        path.set_end()
        path.set_scale(0.0)
        try:
            yield
        finally:
            path.set_scale(1.0)
            if not self.limited:
                self._path = None

    def drop_snapshot(self) -> None:
        """Free the memory of the snapshot."""
        self._snapshot = self._path = None

    def enforce(self, windows: Sequence[Window]) -> None:
        """Hold the limits on these windows together: the one that exceeds them most decides."""
        tried: list[list[Measurement]] = []

        def measure() -> Measurement:
            tried.append([window.measure() for window in windows])
            return max(tried[-1], key=lambda found: (*self._region.limits.exceeds(found), found.kl, found.tokens))

        with self.measuring(windows):
            proposed = measure()
            found = Enforcement(proposed.kl, None, 0, None, proposed)
            if self._snapshot is not None:
                found = self._enforced(self._snapshot, measure, proposed)
        after = next(each for each in reversed(tried) if any(measured is found.measured for measured in each))
        for window, before, measured in zip(windows, tried[0], after, strict=True):
            limit = self._region.limits.anchor_limit(measured)
            window.enforcement = found._replace(kl_proposed=before.kl, measured=measured, limit_anchor=limit)

    def _enforced(
        self, snapshot: UpdateSnapshot, measure: Callable[[], Measurement], proposed: Measurement
    ) -> Enforcement:
        groups = self._trainer.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        if proposed.tokens == 0:
            snapshot.restore()
        found = self._region.enforce(snapshot, measure, proposed, rejected=None if proposed.tokens else NO_TOKENS)
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate  # a rollback restores that of the window's start, and the scheduler would not notice
        return found

    def measure(self, window: Window) -> Measurement:
        """The window under the current policy."""
        with self.measuring([window]):
            return window.measure()

    @contextmanager
    def measuring(self, windows: Sequence[Window]) -> Iterator[None]:
        """The model as it is measured. The time inside is added to that of the windows."""
        started = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(self._model.without_noise())
            for module in self._held:
                stack.enter_context(self._sharding.holding(module))
            yield
        for window in windows:
            window.seconds += (time.perf_counter() - started) / len(windows)
