"""What the phases of an update hand to each other.

Shape words, used in every docstring of the package: B sequences (of this process), T response positions, P prompt
positions, V vocabulary entries, H hidden units; b, t and p are their sizes within one micro-batch. Masks are True where a
token counts. Divergences are in nats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Hidden states [..., H] to logits [..., V], every scaling or soft-capping of the model included.

One whose parameters are trained has them in `parameters()`, as a module does: gradients flow to those alone.
"""


class PolicySnapshot(NamedTuple):
    """A policy at some tokens: the hidden states [N, H] that predict them, and its output head."""

    hidden: Tensor
    head: Head


class Path(Protocol):
    """The segment from θ_old to θ: `set_end()` takes the trained parameters as they are now for θ, and `set_scale(a)` puts
    them at θ_old + a(θ − θ_old)."""

    def set_end(self) -> None: ...

    def set_scale(self, scale: float) -> None: ...


class Snapshot(Protocol):
    """Where an update began. `restore` puts everything that the update changed back, bit for bit."""

    @property
    def path(self) -> Path: ...

    def restore(self) -> None: ...


@dataclass
class UpdateContext:
    """What one update carries from phase to phase; each phase adds what it found out.

    update: the number of updates finished before this one. training: False for a batch of an evaluation, which updates
    nothing. sampling_seed: of this process's stream of random numbers for the rollout. random_states: of the process,
    before the update. episode: responses sampled before the update. seconds: time of each phase. rejected: why the update
    was rolled back, or None. snapshot: where the update began; None before its first step. enforcement: of the trust
    region; None before it was enforced.
    """

    update: int
    training: bool
    sampling_seed: int
    episode: int = 0
    random_states: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    rejected: str | None = None
    snapshot: Snapshot | None = None
    enforcement: Enforcement | None = None

    def taken_snapshot(self) -> Snapshot:
        """The snapshot, once there is one."""
        if self.snapshot is None:
            raise ValueError("`optimise` took no snapshot of the update; an override must call super().optimise")
        return self.snapshot


class Prompts(NamedTuple):
    """One batch of prompts: `ids` and `mask` [B, P], left-padded, and the dataset row behind each of them."""

    ids: Tensor
    mask: Tensor
    rows: list[dict[str, Any]]
    context: UpdateContext | None = None


class Rollout(NamedTuple):
    """Sampled responses.

    prompt_ids, prompt_mask: [B, P], left-padded. response_ids, response_mask: [B, T]; the mask is True up to and
    including the stop token, wherever it is the same token as the padding. sampler_logp: [B, T] log-probability of each
    sampled token under the distribution it was drawn from, or None when the sampler did not tell. rows: the dataset rows.
    context: the update's; the trainer adds it where a `rollout` of the user's leaves it out.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    sampler_logp: Tensor | None = None
    rows: list[dict[str, Any]] | None = None
    context: UpdateContext | None = None


class MicroBatch(NamedTuple):
    """Some rows of a rollout, trimmed to their longest prompt and response; fixed for the whole update.

    rows: [b] indices into the rollout. input_ids, attention_mask, position_ids: [b, p + t]. response_ids,
    response_mask: [b, t].
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_ids: Tensor
    response_mask: Tensor


class TokenOutputs(NamedTuple):
    """What one forward pass says of a micro-batch's response tokens, [b, t] each unless stated.

    logp: log π(token). values: [b, t + 1], the value before each token and after the last. hidden: [N, H], the states
    that predict the N tokens that count. entropy: of π. ref_logp: log π_ref(token); ref_kl: exact KL(π‖π_ref). old_kl,
    old_tv: exact KL(π_old‖π) and total variation. The last five are None unless asked for.
    """

    logp: Tensor
    values: Tensor
    hidden: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_kl: Tensor | None = None
    old_kl: Tensor | None = None
    old_tv: Tensor | None = None


class Scored(NamedTuple):
    """A rollout with everything that is fixed before the first optimizer step; [B, T] unless stated.

    micro_batches, old_snapshots: the fixed micro-batches and π_old at the tokens of each; ref_snapshots: π_ref there, kept only
    where the loss needs it.
    logp, ref_logp: log-probabilities of the sampled tokens. ref_kl: exact KL(π_old‖π_ref) per context. entropy: of
    π_old. values: V(state before the token). loss_mask: tokens that get a gradient (the response mask less the rows
    without a reward). value_mask: positions whose value is trained. scores: [B], NaN where no function gave a reward.
    """

    rollout: Rollout
    micro_batches: list[MicroBatch]
    old_snapshots: list[PolicySnapshot]
    logp: Tensor
    ref_logp: Tensor
    ref_kl: Tensor
    entropy: Tensor
    values: Tensor
    loss_mask: Tensor
    value_mask: Tensor
    scores: Tensor
    completions: list[str]
    ref_snapshots: list[PolicySnapshot] | None = None

    @property
    def context(self) -> UpdateContext:
        """The update's; `score` sees to it that the rollout has one."""
        if self.rollout.context is None:
            raise ValueError("the rollout has no context; the trainer's `score` gives it one")
        return self.rollout.context


class Batch(NamedTuple):
    """What the optimizer sees: a scored rollout, its advantages (whitened if asked) and returns, both [B, T].

    advantage_scale: what whitening multiplied the advantages by; the anchor's term in the loss is multiplied by the same.
    trust_coef: the coefficient λ of the penalty on KL(π_old‖π) in this update,
    beside the advantages as they are here. anchor: the anchor before the first step.
    finite: whether all advantages and returns are, over all processes.
    """

    scored: Scored
    advantages: Tensor
    returns: Tensor
    anchor: AnchorMeasurement
    advantage_scale: float = 1.0
    trust_coef: float = 0.0
    finite: bool = True

    @property
    def context(self) -> UpdateContext:
        return self.scored.context


class AnchorMeasurement(NamedTuple):
    """The anchor at rollout, gathered from all processes; nats per response.

    coef: the coefficient used. kl: mean by the configured estimator. kl_exact: mean of the exact KL(π‖π_ref) summed over
    a response; kl_stderr: its standard error over responses. share: Σ|A_anchor| / Σ(|A_anchor| + |A_score|) before
    whitening, None where the anchor is not in the reward.
    """

    coef: float
    kl: float
    kl_exact: float
    kl_stderr: float
    share: float | None


class EpochStats(NamedTuple):
    """Means over the tokens of one PPO epoch (or of all of them), gathered from all processes."""

    policy_loss: float
    value_loss: float
    gated: float
    gated_low: float
    gated_high: float
    clip_fraction: float
    penalty: float
    value_gated: float
    approx_kl: float
    ratio: float
    ratio_var: float


class UpdateStats(NamedTuple):
    """What happened between the first and the last optimizer step of one update.

    total: over all epochs; epochs: one entry for each epoch begun. steps, planned_steps: optimizer steps taken and
    planned. grad_norm: mean norm of the policy's gradient before clipping; grad_scale: mean factor that clipping applied.
    stopped: the KL limit between mini-batches ended the update. refused: why the update was refused, or None.
    """

    total: EpochStats
    epochs: list[EpochStats]
    steps: int
    planned_steps: int
    grad_norm: float
    grad_scale: float
    stopped: bool
    refused: str | None


class RolloutSummary(NamedTuple):
    """The rollout in numbers, gathered from all processes.

    score: mean over the rows that have one, None where none has. length: mean response tokens. eos_rate: share of
    responses that ended by themselves. entropy: of π_old, nats per token. sampler_kl: k3 of the sampler against the
    training forward, nats per token, None where the sampler did not tell. explained_variance: of the returns, by the value.
    """

    score: float | None
    length: float
    eos_rate: float
    entropy: float
    sampler_kl: float | None
    explained_variance: float


class Measurement(NamedTuple):
    """The batch under the new policy against π_old, gathered from all processes; nats per token.

    kl: mean exact KL(π_old‖π) over the measured contexts; kl_max: the largest. tv: mean total variation. max_ratio and
    ratio_quantiles: of π/π_old at the sampled tokens. tokens: contexts measured; complete: whether that was all of them.
    """

    kl: float
    kl_max: float
    tv: float
    max_ratio: float
    ratio_quantiles: dict[str, float]
    tokens: int
    complete: bool


class Enforcement(NamedTuple):
    """What enforcement did: the KL before it, the scale kept of the step, the tries it took, the limit it holds.

    The scale is None without a limit, and 0 of an update that was rejected. measured: the batch after enforcement, None
    where nothing was enforced. rejected: why the update was rolled back, or None.
    """

    kl_proposed: float
    scale: float | None
    tries: int
    limit: float | None
    measured: Measurement | None = None
    rejected: str | None = None
