"""A trainer that checks what enforcement must leave unchanged, bit for bit, and computes the KL of every update again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.tiny import FAST
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.policy.loading import trainable
from trl_trustkl.types import Batch, Measurement, UpdateStats

FULL = {"peft_config": None}


class Careful(TrustKLPPOTrainer):
    """Checks that enforcement leaves the optimizer, the value and frozen weights unchanged.

    before, proposed: the policy's trained weights before and after the steps of the last update. dense: KL(π_old‖π) after
    each update, from the model's complete forward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before: list[Tensor] = []
        self.proposed: list[Tensor] = []
        self.dense: list[float] = []

    def optimise(self, batch: Batch) -> UpdateStats:
        self.before = [p.detach().clone() for p in trainable(self.model.policy)]
        stats = super().optimise(batch)
        self.proposed = [p.detach().clone() for p in trainable(self.model.policy)]
        return stats

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        moments = copy.deepcopy(self.optimizer.state_dict())
        value = [p.detach().clone() for p in self.model.value.parameters()]
        frozen = [p.detach().clone() for p in self.model.policy.parameters() if not p.requires_grad]
        measured = super().enforce(batch, proposed)
        assert_equal(moments, self.optimizer.state_dict())
        assert moments["state"], "the optimizer has no moments that could change"
        assert_equal(value, list(self.model.value.parameters()))
        assert_equal(frozen, [p for p in self.model.policy.parameters() if not p.requires_grad])
        self.dense.append(self.recomputed(batch))
        return measured

    def recomputed(self, batch: Batch) -> float:
        new = self.logps(batch)
        now = [p.detach().clone() for p in trainable(self.model.policy)]
        put(self.model.policy, self.before)
        old = self.logps(batch)
        put(self.model.policy, now)
        return float(dense_kl(old, new).mean())

    def logps(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            parts = [
                dense_logps(self.model.policy, micro, self.args.temperature)[micro.response_mask]
                for micro in batch.scored.micro_batches
            ]
        return torch.cat(parts)


def put(module: nn.Module, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for p, weight in zip(trainable(module), weights, strict=True):
            p.copy_(weight)


def assert_equal(one: Any, other: Any) -> None:
    """Equality bit for bit of nested dicts, lists, numbers and tensors."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def careful(folder: Any, model: Any = None, *, changes: dict[str, Any] | None = None, **arguments: Any) -> Careful:
    return tiny.trainer(folder, model, kind=Careful, changes=FAST | (changes or {}), **arguments)
