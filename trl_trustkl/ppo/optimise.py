"""The PPO epochs of one update: mini-batches of fixed micro-batches, one optimizer step each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..parallel.processes import Processes
from ..policy.forward import ForwardPass
from ..policy.loading import trainable
from ..policy.value_head import PolicyAndValue
from ..run import rng
from ..run.failure_handling import reject
from ..trust.measurement import measure
from ..trust.snapshot import UpdateSnapshot
from ..types import Batch, Measurement, PolicySnapshot, TokenOutputs, UpdateStats
from .config import TrustKLPPOConfig
from .losses import LossScale, LossSums, Penalties, Rule, epoch_stats, micro_loss, stacked


class Optimisation:
    """Makes the steps of an update.

    Policy and value are clipped to `max_grad_norm` apart from each other, so that a large value error does not shrink the
    policy's step, and the norm on record is the policy's.
    """

    def __init__(
        self, args: TrustKLPPOConfig, model: PolicyAndValue, accelerator: Accelerator, processes: Processes
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.processes = processes
        self.policy_and_value = model
        self.policy_parameters = trainable(model.policy)
        self.value_parameters = trainable(model.value)
        self.model: nn.Module = model
        self.optimizer: Any = None

    def prepare(self, model: nn.Module, optimizer: Any) -> None:
        """Take the model and the optimizer as accelerate wrapped them."""
        self.model, self.optimizer = model, optimizer

    def snapshot(self) -> UpdateSnapshot:
        """Policy, value and optimizer as they are now."""
        return UpdateSnapshot(self.policy_parameters, self.policy_and_value.restorable_value, self.optimizer)

    def update(self, batch: Batch, too_far: Callable[[Sequence[int]], bool], *, lr_factor: float) -> UpdateStats:
        """The PPO epochs on a batch, at the policy's scheduled learning rate times `lr_factor`. An update with a step that
        is not finite is rejected and rolled back; `too_far(micro-batches just stepped)` ends one early."""
        context = batch.context
        context.snapshot = snapshot = self.snapshot()
        if context.rejected is not None:
            stats = self.none(context.rejected)
        else:
            generator = rng.generator(self.args.seed, rng.RngStream.MINI_BATCHES, context.update, self.processes.index)
            with scaled_learning_rate(self.optimizer, self.policy_parameters, lr_factor):
                stats = self.run(batch, generator, too_far)
        if stats.refused is None and not math.isfinite(stats.total.policy_loss + stats.total.value_loss):
            stats = stats._replace(refused="the loss is not finite")
        if stats.refused is not None:
            snapshot.restore()
            reject(context, stats.refused)
        return stats

    def run(
        self, batch: Batch, generator: torch.Generator, too_far: Callable[[Sequence[int]], bool] | None
    ) -> UpdateStats:
        """All epochs, unless `too_far` ends them or a step is refused."""
        args = self.args
        if (reason := not_finite(batch)) is not None:
            return self.none(reason)
        rule = args.build_surrogate()
        penalties = args.build_penalties(batch.anchor.coef * batch.advantage_scale, batch.trust_coef)
        planned = self._planned_steps
        steps, norms, scales, epochs = 0, [], [], []
        refused, stopped = None, False
        for epoch in range(args.num_ppo_epochs):
            sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=self.processes.device)
            for mini in self._mini_batches(len(batch.scored.micro_batches), generator):
                sums += self._backward(batch, mini, rule, penalties)
                norm = self._clip(self.policy_parameters)
                value_norm = self._clip(self.value_parameters)
                if self.accelerator.scaler is None and not (math.isfinite(norm) and math.isfinite(value_norm)):
                    which = "policy's" if not math.isfinite(norm) else "value's"
                    refused = f"the {which} gradient is not finite in epoch {epoch + 1}, step {steps + 1} of {planned}"
                    self.optimizer.zero_grad()
                    break
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.optimizer_step_was_skipped:  # fp16, while the loss scale is still being found
                    continue
                steps += 1
                norms.append(norm)
                scales.append(self._scale(norm))
                if too_far is not None and steps < planned and too_far(mini):
                    stopped = True
                    break
            epochs.append(self.processes.sum(sums))
            if stopped or refused is not None:
                break
        return UpdateStats(
            total=epoch_stats(torch.stack(epochs).sum(0)),
            epochs=[epoch_stats(sums) for sums in epochs],
            steps=steps,
            planned_steps=planned,
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            grad_scale=sum(scales) / len(scales) if scales else 1.0,
            stopped=stopped,
            refused=refused,
        )

    def none(self, reason: str) -> UpdateStats:
        """The statistics of an update that was refused before its first step."""
        none = epoch_stats(torch.zeros(len(LossSums._fields)))
        return UpdateStats(none, [], 0, self._planned_steps, math.nan, 1.0, stopped=False, refused=reason)

    @property
    def _planned_steps(self) -> int:
        return self.args.num_ppo_epochs * self.args.num_mini_batches

    def _mini_batches(self, count: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Indices of micro-batches, shuffled anew each epoch, in equal mini-batches."""
        order = torch.randperm(count, generator=generator).tolist()
        size = count // self.args.num_mini_batches
        for start in range(0, count, size):
            yield order[start : start + size]

    def _backward(self, batch: Batch, mini: list[int], rule: Rule, penalties: Penalties) -> Tensor:
        """Accumulate the mini-batch's gradient; returns its sums on this process."""
        args, scored = self.args, batch.scored
        scale = self._loss_scale(batch, mini)
        total = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=self.processes.device)
        for number, index in enumerate(mini, start=1):
            micro = scored.micro_batches[index]
            with self._synchronised(last=number == len(mini)):
                loss, sums = micro_loss(
                    self._forward(batch, index, penalties),
                    micro,
                    batch,
                    scale,
                    rule=rule,
                    vf_coef=args.vf_coef,
                    value_range=args.value_range,
                    penalties=penalties,
                )
                # Gradients are averaged over processes; the loss is already divided by the count of all of them.
                self.accelerator.backward(loss * self.processes.count)
            total += stacked(sums)
        return total

    def _forward(self, batch: Batch, index: int, penalties: Penalties) -> TokenOutputs:
        """The micro-batch under the policy, with the exact divergences that the loss needs, and no others."""
        scored = batch.scored
        snapshots: dict[str, PolicySnapshot] = {}
        if penalties.anchor_coef and penalties.anchor_estimator is None and scored.ref_snapshots is not None:
            snapshots["ref"] = scored.ref_snapshots[index]
        if penalties.trust_coef and penalties.trust_estimator is None:
            snapshots["old"] = scored.old_snapshots[index]
        return self.model(scored.micro_batches[index], **snapshots)

    def _loss_scale(self, batch: Batch, mini: list[int]) -> LossScale:
        rows = torch.cat([batch.scored.micro_batches[index].rows for index in mini])
        counts = torch.stack([batch.scored.loss_mask[rows].sum(), batch.scored.value_mask[rows].sum()])
        return LossScale(*self.processes.sum(counts.double()).tolist())

    def _synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """Clip to `max_grad_norm` where it is on; returns the norm before."""
        if not parameters:
            return 0.0
        if self.accelerator.scaler is not None and parameters is self.policy_parameters:
            self.accelerator.unscale_gradients()
        return float(nn.utils.clip_grad_norm_(parameters, self.args.norm_limit or math.inf))

    def _scale(self, norm: float) -> float:
        limit = self.args.norm_limit
        return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


def measured(batch: Batch, indices: Iterable[int], forward: ForwardPass, processes: Processes) -> Measurement:
    """Some micro-batches of a batch under the policy as it is now, against π_old."""
    scored = batch.scored
    return measure(
        forward.compare,
        scored.micro_batches,
        scored.old_snapshots,
        scored.logp,
        scored.rollout.response_mask,
        gather=processes.gather,
        indices=indices,
    )


@contextmanager
def scaled_learning_rate(optimizer: Any, policy: Sequence[nn.Parameter], factor: float) -> Iterator[None]:
    """The policy's scheduled learning rate times the factor, inside only: the schedule never sees it."""
    of_policy = {id(p) for p in policy}
    groups = [g for g in optimizer.param_groups if any(id(p) in of_policy for p in g["params"])]
    scheduled = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate


def not_finite(batch: Batch) -> str | None:
    """Why no step can be made from this batch, the same on every process; None where one can."""
    anchor = batch.anchor
    if anchor.coef and not (math.isfinite(anchor.kl) and math.isfinite(anchor.kl_exact)):
        return "the KL to the reference is not finite"
    if not batch.finite:
        return "an advantage or a return is not finite"
    return None


def adopt(optimizer: Any, model: Any, *, rate: float | None, scheduled: bool) -> None:
    """Make an optimizer that was given fit a PolicyAndValue: it must have the policy's parameters, and gets the value's.

    They come into a group of their own with `value_learning_rate`; into the first where a scheduler counts the groups.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"`optimizers` got {shown(optimizer)} in the first place; it must be a torch.optim.Optimizer or None."
        )
    had = {id(p) for group in optimizer.param_groups for p in group["params"]}
    policy = trainable(model.policy)
    if left_out := sum(id(p) not in had for p in policy):
        raise ConfigError(
            f"`optimizers` got an optimizer without {left_out} of the {len(policy)} tensors of the policy that are trained. "
            "With `peft_config` the trainer makes them: give it a model that has its adapter, from "
            "peft.get_peft_model(model, peft_config), or leave `optimizers` out and set `optim` and `learning_rate`."
        )
    value = [p for p in trainable(model.value) if id(p) not in had]
    if value and scheduled:
        optimizer.param_groups[0]["params"].extend(value)
    elif value:
        optimizer.add_param_group({"params": value} | ({} if rate is None else {"lr": rate}))


def separate_value(optimizer: Any, value: Sequence[nn.Parameter], *, rate: float | None) -> None:
    """Move the value's parameters into groups for their own learning rate; with None it is the policy's."""
    ids = {id(p) for p in value}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in ids]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            settings = {key: setting for key, setting in group.items() if key != "params"}
            optimizer.add_param_group({**settings, "params": mine, "lr": group["lr"] if rate is None else rate})
