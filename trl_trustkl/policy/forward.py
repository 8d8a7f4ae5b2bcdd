"""Forward passes of policy and value without a backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..types import MicroBatch, PolicySnapshot, TokenOutputs
from .value_head import PolicyAndValue


class ForwardPass:
    """Forward passes under the autocast of training, whose numbers they have bit for bit, without gradients."""

    def __init__(self, model: PolicyAndValue, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.model = model
        self.autocast = autocast

    def score(self, micro: MicroBatch, reference: PolicySnapshot) -> TokenOutputs:
        """Log-probabilities, values, entropy, and the exact KL(π‖π_ref) to the reference at these tokens."""
        with torch.no_grad(), self.autocast():
            return self.model(micro, entropy=True, ref=reference)

    def compare(self, micro: MicroBatch, old: PolicySnapshot) -> TokenOutputs:
        """Log-probabilities, and the exact KL(π_old‖π) and total variation from π_old at these tokens; no values."""
        with torch.no_grad(), self.autocast():
            return self.model(micro, values=False, old=old)
