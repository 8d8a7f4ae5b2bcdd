"""KL(π_old‖π) of every update, computed again without any of the trainer's passes: dense and in float64.

A float64 copy of the policy (4-bit weights dequantized) takes the weights from before and after the update, and reads the
entire rollout in one batch padded on the right, instead of trimmed micro-batches padded on the left.
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests import tiny
from tests.dense import dense_kl, rollout_logps
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.policy.loading import trainable
from trl_trustkl.records import BoundRecord
from trl_trustkl.types import Batch, Measurement, Rollout, UpdateStats

ROUNDING = 1e-7
"""Nats by which a dense KL may exceed the limit: the rounding of float32."""

# At a learning rate of 5e-3, llama and gpt2 propose updates around the limit; 5e-2 is ten times too high for them, and more
# than that for gemma2.
TOO_FAST = {
    "learning_rate": 5e-2,
    "lr_scheduler_type": "constant",
    "kl_coef": 0.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 1,
    "response_length": 4,
    "temperature": 0.8,
    "logging_steps": 1000,
}


def in_float64(policy: nn.Module) -> nn.Module:
    """A copy of the policy in float64, with quantized weights dequantized."""
    clone = copy.deepcopy(policy)
    for name, module in list(clone.named_modules()):
        if type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(clone.get_submodule(parent), child, dequantized(module))
    return clone.double().requires_grad_(False)


def dequantized(module: nn.Module) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(dequantize_4bit(module.weight.data, module.weight.quant_state), requires_grad=False)
    plain.bias = module.bias
    return plain


class Update(NamedTuple):
    """One update: its record, KL(π_old‖π) by the witness, and the seconds that enforcement took."""

    record: BoundRecord
    dense: float
    seconds: float


class Dense(NamedTuple):
    """One update, by the witness: the largest KL(π_old‖π) of a token, and the largest sum over a response; KL(π‖π_ref) per
    response before and after the update."""

    token: float
    response: float
    anchor_before: float
    anchor: float


class Witnessed(TrustKLPPOTrainer):
    """Keeps the weights from before each update, and computes its KL again once the trainer has recorded it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.witness = in_float64(self.model.policy)
        self.updates: list[Update] = []
        self.dense: list[Dense] = []
        self.start = [p.detach().clone() for p in trainable(self.model.policy)]

    def optimise(self, batch: Batch) -> UpdateStats:
        self.before = [p.detach().clone() for p in trainable(self.model.policy)]
        return super().optimise(batch)

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        started = time.perf_counter()
        measured = super().enforce(batch, proposed)
        self.enforcing = time.perf_counter() - started
        return measured

    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> BoundRecord:
        record = super().record(batch, stats, measured)
        after = [p.detach().clone() for p in trainable(self.model.policy)]
        rollout = batch.scored.rollout
        old, new = self.at(self.before, rollout), self.at(after, rollout)
        dense, counts = dense_kl(old, new), rollout.response_mask.sum(1).tolist()
        ref = self.of_reference(rollout)
        before, anchor = (float(dense_kl(each, ref).sum()) / len(counts) for each in (old, new))
        largest = max(float(part.sum()) for part in dense.split(counts))
        self.updates.append(Update(record, float(dense.mean()), self.enforcing))
        self.dense.append(Dense(float(dense.max()), largest, before, anchor))
        return record

    def of_reference(self, rollout: Rollout) -> Tensor:
        """log π_ref at the response tokens: without the adapter, or with the weights from before training."""
        if isinstance(self.witness, PeftModel):
            with self.witness.disable_adapter():
                return rollout_logps(self.witness, rollout, self.args.temperature)
        return self.at(self.start, rollout)

    @torch.no_grad()
    def at(self, weights: list[Tensor], rollout: Rollout) -> Tensor:
        names = [name for name, p in self.model.policy.named_parameters() if p.requires_grad]
        own = dict(self.witness.named_parameters())
        for name, weight in zip(names, weights, strict=True):
            own[name].copy_(weight)
        return rollout_logps(self.witness, rollout, self.args.temperature)


def witnessed(folder: Any, model: Any = None, *, changes: dict[str, Any], **arguments: Any) -> Witnessed:
    """A `Witnessed` trainer, built as by `tiny.trainer`."""
    return tiny.trainer(folder, model, kind=Witnessed, changes=changes, **arguments)


def pretending(trainer: Witnessed) -> Witnessed:
    """The trainer, which reports what enforcement would do, but keeps the complete update."""
    enforce = trainer.enforce

    def pretend(batch: Batch, proposed: Measurement) -> Measurement:
        measured = enforce(batch, proposed)
        batch.context.snapshot.path.set_scale(1.0)
        return measured

    trainer.enforce = pretend
    return trainer


def assert_within(updates: list[Update], limit: float, *, agreement: float = 5e-5, rounding: float = ROUNDING) -> None:
    """The limit holds after every update, by the record and by the witness, and the two agree.

    They agree to 1e-7 nats on average; at large weights, logits in float32 are off by up to 2e-5.
    """
    for number, (record, dense, _) in enumerate(updates, start=1):
        trust = record.trust
        assert trust.kl <= limit, number
        assert dense <= limit + rounding, number
        assert dense == pytest.approx(trust.kl, abs=agreement), number
        assert trust.limit == limit and trust.guaranteed == limit, number
        assert record.refused is None, number
