"""Forward passes of policy and value without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..parallel.sharding import REPLICATED, Replicated
from ..types import Head, MicroBatch, PolicySnapshot
from .exact_kl import TokenOutputs
from .reference import Reference
from .value_head import PolicyAndValue


@dataclass(frozen=True)
class ForwardPass:
    """Forward passes without gradients, under the autocast of training, so that the results equal training's bit for bit."""

    model: PolicyAndValue
    autocast: Callable[[], AbstractContextManager[Any]]
    sharding: Replicated = REPLICATED

    @torch.no_grad()
    def score(self, micro: MicroBatch, reference: PolicySnapshot) -> TokenOutputs:
        """Log-probabilities, values, entropy, and the exact KL(π‖π_ref) at these tokens."""
        with self.autocast():
            return self.sharding.run(lambda: self.model(micro, entropy=True, ref=reference))

    @torch.no_grad()
    def compare(self, micro: MicroBatch, old: PolicySnapshot, reference: PolicySnapshot | None = None) -> TokenOutputs:
        """Log-probabilities, the exact KL(π_old‖π) and total variation, and with a reference KL(π‖π_ref) at these tokens;
        values are 0."""
        with self.autocast():
            return self.sharding.run(lambda: self.model(micro, values=False, old=old, ref=reference))

    @torch.no_grad()
    def frozen_head(self) -> Head:
        """The policy's head with its current weights, complete on every process, which later updates do not change."""
        return self.sharding.run(self.model.split_lm.frozen_head)

    @torch.no_grad()
    def reference_snapshot(self, reference: Reference, micro: MicroBatch) -> PolicySnapshot:
        """π_ref at the micro-batch's response tokens."""
        with self.autocast():
            return self.sharding.run_reference(lambda: reference.snapshot(micro))
