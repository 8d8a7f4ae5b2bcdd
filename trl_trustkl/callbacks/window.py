"""One generation batch of GRPO or RLOO, while the trainer makes optimizer steps on it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..parallel.processes import Processes
from ..policy.observed_lm import ObservedLM
from ..policy.reference import Reference
from ..trl_compat.generation import Completion
from ..trust.measurement import anchor_measurement, measure
from ..types import AnchorMeasurement, Enforcement, Measurement, MicroBatch, PolicySnapshot


class Window:
    """A generation batch from the first optimizer step on it to the last, under the one policy π_old that generated it.

    Args:
        model: the policy. processes: those of the run; each has a part of the batch.
        micro_batches: of this process, in the trainer's order.
        ends_at: the number of training passes after which the batch is not used any more.
        coef: the coefficient β of the anchor that the steps use.
        completions: the rows of the batch as text, of all processes.
        scores: those of the rows of this process, NaN for none, in the order of the micro-batches; None where unknown.
    """

    def __init__(
        self,
        model: ObservedLM,
        processes: Processes,
        micro_batches: Sequence[MicroBatch],
        *,
        ends_at: int,
        coef: float,
        completions: Sequence[Completion],
        scores: Tensor | None = None,
    ) -> None:
        self._model = model
        self._processes = processes
        self.micro_batches = micro_batches
        self.ends_at = ends_at
        self.coef = coef
        self.completions = completions
        self.scores = None if processes.any(scores is None) or scores is None else processes.gather(scores)
        self.mask = self._mask()
        self.states: dict[int, Tensor] = {}
        self.old: list[PolicySnapshot] = []
        self.ref: list[PolicySnapshot] | None = None
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)
        self.passes = 0
        self.step_passes = 0  # since the last step
        self.epochs = 0.0
        self.steps = 0
        self.dropped_steps = 0
        self.stopped = False
        self.lr = math.nan
        self.lr_factor = 1.0
        self.step_seconds = 0.0
        self.seconds = 0.0
        self.anchor: AnchorMeasurement | None = None
        self.enforcement: Enforcement | None = None

    def _mask(self) -> Tensor:
        """The response tokens that count, [B, T] with the T of the process with the longest response."""
        masks = [micro.response_mask for micro in self.micro_batches]
        length = self._processes.max(max(mask.shape[1] for mask in masks))
        mask = masks[0].new_zeros(sum(map(len, masks)), length)
        for micro in self.micro_batches:
            mask[micro.rows, : micro.response_mask.shape[1]] = micro.response_mask
        return mask

    def add_pass(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Count a training pass over one of the micro-batches, with what the trainer measured in it."""
        self.passes += 1
        self.step_passes += 1
        for name, values in metrics.items():
            self.metrics[name].extend(values)

    def begin_step(self, *, lr: float | None, lr_factor: float) -> None:
        """Count an optimizer step; the rates are those of the first, None where the optimizer finds its own. `epochs` are the
        passes of the steps that are made."""
        if not self.steps:
            self.lr, self.lr_factor = math.nan if lr is None else lr, lr_factor
        self.steps += 1
        self.step_passes = 0
        self.dropped_steps += self.stopped
        if not self.stopped:
            self.epochs = self.passes / len(self.micro_batches)

    def release(self) -> None:
        """Free the memory of π_old and π_ref, after the last measurement."""
        self.old, self.ref = [], None

    def fix_old_policy(self) -> None:
        """Make the current policy π_old: its states are those in `states`, and come from a pass where they are missing."""
        head = self._model.frozen_head()
        self.old = [
            PolicySnapshot(self.states[i] if i in self.states else self._model.hidden_states(micro), head)
            for i, micro in enumerate(self.micro_batches)
        ]
        self.states = {}

    def measure_anchor(
        self, reference: Reference, estimator: Callable[[Tensor, Tensor], Tensor], *, keep: bool = False
    ) -> None:
        """Measure KL(π_old‖π_ref), if any token counts: exactly, and by `estimator(logp, ref_logp)` at the sampled tokens.

        With `keep`, π_ref is kept for `measure`.
        """
        estimate, exact = (torch.zeros(self.mask.shape, device=self.mask.device) for _ in range(2))
        kept = []
        for micro, old in zip(self.micro_batches, self.old, strict=True):
            ref = reference.snapshot(micro)
            kept.append(ref)
            out = self._model.to_reference(micro, old, ref)
            assert out.ref_logp is not None and out.ref_kl is not None
            length = micro.response_ids.shape[1]
            estimate[micro.rows, :length] = estimator(out.logp.float(), out.ref_logp.float())
            exact[micro.rows, :length] = out.ref_kl.float()
        gather = self._processes.gather
        mask = gather(self.mask)
        if mask.any():
            self.anchor = anchor_measurement(gather(estimate), gather(exact), mask, coef=self.coef)
        if keep:
            self.ref = kept

    def measure(self) -> Measurement:
        """KL(π_old‖π) and ratios of the current policy, and KL(π‖π_ref) where π_ref was kept, over the batch of all
        processes."""
        return measure(
            self._model.compare, self.micro_batches, self.old, self.mask,
            ref=self.ref, anchor_start=0.0 if self.anchor is None else self.anchor.kl_exact,
            gather=self._processes.gather,
        )  # fmt: skip


def share_time(windows: Sequence[Window]) -> None:
    """Divide the time of a step's passes, which TRL logs at the last one, among the windows of the passes."""
    seconds, passes = sum(windows[-1].metrics.pop("step_time", ())), sum(window.step_passes for window in windows)
    for window in windows:
        window.step_seconds += seconds * window.step_passes / passes
