"""The PPO epochs of one update: mini-batches of fixed micro-batches, one optimizer step each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..parallel.processes import Processes
from ..parallel.sharding import REPLICATED, Replicated
from ..policy.exact_kl import TokenOutputs
from ..policy.loading import trainable
from ..policy.value_head import PolicyAndValue
from ..run import rng
from ..run.failure_handling import reject
from ..surrogates import ClipRule
from ..trust.attribution import ReplayPoint
from ..trust.gradient_scale import GradientScale, rescales_gradients
from ..trust.learning_rate import check_adaptable, scaled_learning_rate
from ..trust.snapshot import UpdateSnapshot
from ..types import Batch, PolicySnapshot, UpdateStats
from .config import TrustKLPPOConfig
from .losses import LossScale, LossSums, Penalties, epoch_stats, micro_loss, token_weights


class Optimisation:
    """Makes the optimizer steps of an update.

    The gradients of policy and value are clipped to `max_grad_norm` separately, so that a large value error does not shrink
    the policy's step. The recorded norm is the policy's.
    """

    def __init__(
        self,
        args: TrustKLPPOConfig,
        model: PolicyAndValue,
        accelerator: Accelerator,
        processes: Processes,
        sharding: Replicated = REPLICATED,
    ) -> None:
        self.args = args
        self.sharding = sharding
        self.accelerator = accelerator
        self.processes = processes
        self.policy_and_value = model
        self.policy_parameters = trainable(model.policy)
        self.value_parameters = trainable(model.value)
        self.model: nn.Module = model
        self.optimizer: Any = None
        self.rescales_gradients = True
        self.policy_scale, self.value_scale = GradientScale(), GradientScale()

    def prepare(self, model: nn.Module, optimizer: Any) -> None:
        """Use the model and the optimizer that `Replicated.prepare` returned."""
        # Accelerate's state is the process's: a run of another trainer that ended within an accumulation leaves it such that
        # no optimizer makes a step.
        GradientState()._set_sync_gradients(True)
        if self.args.trust_lr_target is not None:
            check_adaptable(optimizer, "trust_lr_target")
        if optimizer is not self.optimizer:
            self.rescales_gradients = rescales_gradients(optimizer)
            self.policy_scale, self.value_scale = GradientScale(), GradientScale()
        self.model, self.optimizer = model, optimizer
        self.policy_parameters = trainable(self.policy_and_value.policy)
        self.value_parameters = trainable(self.policy_and_value.value)

    def end(self, stats: UpdateStats) -> None:
        """Remember the gradients of an update that was kept."""
        self.policy_scale.add(stats.norms, self.args.norm_limit)
        self.value_scale.add(stats.value_norms, self.args.norm_limit)

    def state_dict(self) -> dict[str, list[float]]:
        return {"policy_gradients": self.policy_scale.state_dict(), "value_gradients": self.value_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy_scale.load_state_dict(state.get("policy_gradients", [0.0, 0.0]))  # older checkpoints lack them
        self.value_scale.load_state_dict(state.get("value_gradients", [0.0, 0.0]))

    def replay_point(self, snapshot: UpdateSnapshot | None = None) -> ReplayPoint:
        """The current state, all of it; `snapshot` is what was taken of it already."""
        if snapshot is None:
            snapshot = self._snapshot(self.policy_parameters, self.value_parameters)
            return ReplayPoint([snapshot], self.accelerator.scaler)
        restorable = {id(parameter) for parameter in self.policy_and_value.restorable_value}
        others = [parameter for parameter in self.value_parameters if id(parameter) not in restorable]
        snapshots = [snapshot, self._snapshot([], others)] if others else [snapshot]
        return ReplayPoint(snapshots, self.accelerator.scaler)

    def _snapshot(self, trained: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> UpdateSnapshot:
        return UpdateSnapshot(trained, others, self.optimizer, self.sharding)

    def update(self, batch: Batch, too_far: Callable[[Sequence[int]], bool], *, lr_factor: float) -> UpdateStats:
        """Run the PPO epochs at the policy's scheduled learning rate times `lr_factor`.

        An update with a step or a loss that is not finite is rejected and rolled back. `too_far`, called with the
        micro-batches just stepped, ends an update early.
        """
        context = batch.context
        if context.without is None:  # a rerun has the update's
            snapshot = self._snapshot(self.policy_parameters, self.policy_and_value.restorable_value)
            context.snapshot = snapshot
            context.start = self.replay_point(snapshot) if context.attributed else None
        reason = not_finite(batch) if context.rejected is None else context.rejected
        if reason is None:
            generator = rng.generator(self.args.seed, rng.RngStream.MINI_BATCHES, context.update, self.processes.index)
            with scaled_learning_rate(self.optimizer, self.policy_parameters, lr_factor):
                stats = self.run(batch, generator, too_far)
        else:
            none, planned = epoch_stats(self._zero_sums()), self._planned_steps
            stats = UpdateStats(none, [], 0, planned, math.nan, 1.0, stopped=False, refused=reason)
        if stats.refused is None and not math.isfinite(stats.total.policy_loss + stats.total.value_loss):
            stats = stats._replace(refused="the loss is not finite")
        if stats.refused is not None:
            context.taken_snapshot().restore()
            reject(context, stats.refused)
        return stats

    def run(
        self, batch: Batch, generator: torch.Generator, too_far: Callable[[Sequence[int]], bool] | None
    ) -> UpdateStats:
        """Run all epochs, unless `too_far` ends them or a step is rejected."""
        args, planned, without = self.args, self._planned_steps, batch.scored.without
        rule = args.build_surrogate(clip=without != "clip")
        trust_coef = 0.0 if without == "penalty" else batch.trust_coef
        penalties = args.build_penalties(batch.anchor.coef * batch.advantage_scale, trust_coef)
        clip = self._unlimited if without == "grad_norm" else self._clip
        norms: list[float] = []
        value_norms: list[float] = []
        epochs: list[Tensor] = []
        refused, stopped = None, False
        for epoch in range(args.num_ppo_epochs):
            sums = self._zero_sums()
            for mini in self._mini_batches(len(batch.scored.micro_batches), generator):
                sums += self._backward(batch, mini, rule, penalties)
                both = [clip(self.policy_parameters), clip(self.value_parameters)]
                norm, value_norm = torch.stack(both).tolist()  # the one read of a step
                if self.accelerator.scaler is None and not (math.isfinite(norm) and math.isfinite(value_norm)):
                    which = "value's" if math.isfinite(norm) else "policy's"
                    step = f"epoch {epoch + 1}, step {len(norms) + 1} of {planned}"
                    refused = f"the {which} gradient is not finite in {step}"
                    self.optimizer.zero_grad()
                    break
                self.sharding.step(self.optimizer)
                self.optimizer.zero_grad()
                if self.accelerator.optimizer_step_was_skipped:  # fp16, while the loss scale is still being found
                    continue
                norms.append(norm)
                value_norms.append(value_norm)
                if too_far is not None and len(norms) < planned and too_far(mini):
                    stopped = True
                    break
            epochs.append(self.processes.sum(sums))
            if stopped or refused is not None:
                break
        found = torch.stack(epochs).cpu()
        limit = args.norm_limit or math.inf
        scales = [min(1.0, limit / (norm + 1e-6)) for norm in norms]
        return UpdateStats(
            total=epoch_stats(found.sum(0)),
            epochs=[epoch_stats(sums) for sums in found],
            steps=len(norms),
            planned_steps=planned,
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            grad_scale=sum(scales) / len(scales) if scales else 1.0,
            stopped=stopped,
            refused=refused,
            norms=norms,
            value_norms=value_norms,
        )

    @property
    def _planned_steps(self) -> int:
        return self.args.num_ppo_epochs * self.args.num_mini_batches

    def _zero_sums(self) -> Tensor:
        return torch.zeros(len(LossSums._fields), dtype=torch.float64, device=self.processes.device)

    def _mini_batches(self, count: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Equal mini-batches of micro-batch indices, shuffled again in each epoch."""
        order = torch.randperm(count, generator=generator).tolist()
        size = count // self.args.num_mini_batches
        for start in range(0, count, size):
            yield order[start : start + size]

    def _backward(self, batch: Batch, mini: list[int], rule: ClipRule, penalties: Penalties) -> Tensor:
        """Accumulate the mini-batch's gradient; returns its sums on this process."""
        scored, total = batch.scored, self._zero_sums()
        rows = torch.cat([scored.micro_batches[index].rows for index in mini])
        aggregation, length = self.args.aggregation, self.args.response_length
        _, terms = token_weights(scored.loss_mask[rows], aggregation, length)
        counts = torch.stack([terms, scored.value_mask[rows].sum()])
        value_range = None if scored.without == "value_clip" else self.args.value_range
        mask_kl = None if scored.without == "response_mask" else self.args.response_mask_kl
        # In float32, as the loss; float64 would make the loss of that dtype, and a number on the host a synchronisation.
        scale = LossScale(*self.processes.sum(counts.double()).clamp(min=1.0).float())
        for index in mini:
            # Gradients are synchronised in the backward pass of the last micro-batch.
            with self.sharding.accumulating(self.accelerator, self.model, last=index == mini[-1]):
                loss, sums = micro_loss(
                    self._forward(batch, index, rule, penalties, mask_kl), scored.micro_batches[index], batch, scale, rule=rule,
                    aggregation=aggregation, length=length, vf_coef=self.args.vf_coef,
                    value_range=value_range, penalties=penalties, mask_kl=mask_kl,
                )  # fmt: skip
                # Gradients are averaged over processes; the loss is already divided by the count of all of them.
                self.sharding.backward(self.accelerator, loss * self.processes.count)
            total += torch.stack([each.detach().double() for each in sums])
        return total

    def _forward(
        self, batch: Batch, index: int, rule: ClipRule, penalties: Penalties, mask_kl: float | None
    ) -> TokenOutputs:
        """The outputs of a micro-batch, with only those exact divergences and projections that the loss needs."""
        scored = batch.scored
        snapshots: dict[str, PolicySnapshot] = {}
        if penalties.anchor_coef and penalties.anchor_estimator is None and scored.ref_snapshots is not None:
            snapshots["ref"] = scored.ref_snapshots[index]
        masks = mask_kl is not None and scored.sampler_logp is None
        if masks or rule.limit is not None or (penalties.trust_coef and penalties.trust_estimator is None):
            snapshots["old"] = scored.old_snapshots[index]
        return self.model(scored.micro_batches[index], **snapshots, limit=rule.limit)

    def _unlimited(self, parameters: list[nn.Parameter]) -> Tensor:
        """Leave the gradients as they are without `max_grad_norm`; returns their norm.

        For an optimizer that rescales gradients they are multiplied by one factor for all steps. By itself the factor would
        have no effect, but the optimizer's running means are of gradients that were clipped: next to these, gradients without
        the factor would make steps that are much too long, which no run without `max_grad_norm` makes.
        """
        norm = self._clip(parameters, math.inf)
        scale = self.policy_scale if parameters is self.policy_parameters else self.value_scale
        if self.rescales_gradients and scale.factor != 1.0:
            self.sharding.scale_gradients(parameters, scale.factor)
        return norm

    def _clip(self, parameters: list[nn.Parameter], limit: float | None = None) -> Tensor:
        """Clip the gradients to the norm `limit`, by default `max_grad_norm` where it is on; returns the norm before."""
        if not parameters:
            return torch.zeros((), dtype=torch.float64, device=self.processes.device)
        if self.accelerator.scaler is not None and parameters is self.policy_parameters:
            self.accelerator.unscale_gradients()
        norm = self.sharding.clip(parameters, limit or self.args.norm_limit or math.inf)
        return norm.to(self.processes.device, torch.float64)


def not_finite(batch: Batch) -> str | None:
    """The reason why no step can be made with this batch, the same on every process; None if a step can be made."""
    anchor = batch.anchor
    if not batch.scored.sampler_finite:
        return "the sampler's log-probabilities are not finite"
    if anchor.coef and not (math.isfinite(anchor.kl) and math.isfinite(anchor.kl_exact)):
        return "the KL to the reference is not finite"
    return None if batch.finite else "an advantage or a return is not finite"


def adopt(optimizer: Any, model: PolicyAndValue, *, rate: float | None, scheduled: bool) -> None:
    """Check that a given optimizer has the policy's parameters, and add the value's.

    They are added as a separate group with `value_learning_rate`, or to the first group if the scheduler depends on the
    number of groups.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"`optimizers[0]` got {shown(optimizer)}; it must be a torch.optim.Optimizer or None.")
    had = {id(p) for group in optimizer.param_groups for p in group["params"]}
    policy = trainable(model.policy)
    if left_out := sum(id(p) not in had for p in policy):
        raise ConfigError(
            f"`optimizers` got an optimizer without {left_out} of the {len(policy)} tensors of the policy that are trained. "
            "With `peft_config` the trainer creates the adapter: pass a model that already has it, from "
            "peft.get_peft_model(model, peft_config), or leave `optimizers` out and set `optim` and `learning_rate`."
        )
    value = [p for p in trainable(model.value) if id(p) not in had]
    if value and scheduled:
        optimizer.param_groups[0]["params"].extend(value)
    elif value:
        optimizer.add_param_group({"params": value} | ({} if rate is None else {"lr": rate}))


def separate_value(optimizer: Any, value: Sequence[nn.Parameter], *, rate: float | None) -> None:
    """Move the value's parameters into groups with a separate learning rate; None: the policy's."""
    ids = {id(p) for p in value}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in ids]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group(group | {"params": mine, "lr": group["lr"] if rate is None else rate})
