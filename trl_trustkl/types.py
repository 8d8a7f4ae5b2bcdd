"""The data that the phases of an update pass to each other.

Shapes, in every docstring of the package: B sequences (of this process), T response positions, P prompt positions, V
vocabulary entries, H hidden units; b, t and p are their sizes within one micro-batch. Masks are True where a token counts.
Divergences are in nats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Hidden states [..., H] to logits [..., V], including any scaling or soft-capping of the model.

A head with trained parameters has a method `parameters()`, as a module has: gradients flow only to these.
"""


class PolicySnapshot(NamedTuple):
    """A policy at some tokens: the hidden states [N, H] that predict them, and its output head."""

    hidden: Tensor
    head: Head


class Path(Protocol):
    """The segment from θ_old to θ: `set_end()` makes the current trained parameters θ, and `set_scale(a)` sets them to
    θ_old + a(θ − θ_old)."""

    def set_end(self) -> None: ...

    def set_scale(self, scale: float) -> None: ...


class Restorable(Protocol):
    """A state that `restore` restores bit for bit."""

    def restore(self) -> None: ...


class Snapshot(Restorable, Protocol):
    """The state before an update: everything that the update changes."""

    @property
    def path(self) -> Path: ...


@dataclass
class UpdateContext:
    """What is passed from phase to phase of one update; each phase adds its results.

    update: updates finished before this one. training: False for a batch of an evaluation, which updates nothing.
    sampling_seed, first_row, row_step: the i-th response of this process is number first_row + i × row_step of all processes,
    and its random numbers depend on this number and the seed. random_states: of the process, before the update. episode:
    responses sampled before the update. seconds: time of each phase. sync_seconds: time in which the rollout engine got the
    policy's weights. rejected: why the update was rolled back, or None. snapshot: None before the first step.
    enforcement: of the trust region; None before it was enforced.

    attributed: whether the update is rerun without each mechanism. without: the mechanism that is off in such a rerun; None
    in the update itself. start: the state from which it is rerun. counterfactual: the results of these reruns.
    """

    update: int
    training: bool
    sampling_seed: int
    first_row: int = 0
    row_step: int = 1
    episode: int = 0
    random_states: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    rejected: str | None = None
    snapshot: Snapshot | None = None
    enforcement: Enforcement | None = None
    sync_seconds: float = 0.0
    attributed: bool = False
    without: str | None = None
    start: Restorable | None = None
    counterfactual: dict[str, float | None] | None = None

    def taken_snapshot(self) -> Snapshot:
        """The snapshot; ValueError if `optimise` did not take one."""
        if self.snapshot is None:
            raise ValueError("`optimise` took no snapshot of the update; an override must call super().optimise")
        return self.snapshot


class Prompts(NamedTuple):
    """One batch of prompts: `ids` and `mask` [B, P], left-padded, and the dataset row of each."""

    ids: Tensor
    mask: Tensor
    rows: list[dict[str, Any]]
    context: UpdateContext | None = None


class Rollout(NamedTuple):
    """Sampled responses.

    prompt_ids, prompt_mask: [B, P], left-padded. response_ids, response_mask: [B, T]; the mask is True up to and
    including the last token, also where that is the padding token. sampler_logp: [B, T] log-probability of each sampled
    token under the distribution it was drawn from, or None where the sampler gives none. rows: the dataset rows. context:
    the update's; the trainer adds it where an overridden `rollout` leaves it out. ended: [B] whether a response ended with a
    stop token or a stop string, or None where only a stop token ends one.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    sampler_logp: Tensor | None = None
    rows: list[dict[str, Any]] | None = None
    context: UpdateContext | None = None
    ended: Tensor | None = None


class MicroBatch(NamedTuple):
    """Some rows of a rollout, trimmed to their longest prompt and response; fixed for the entire update.

    rows: [b] indices into the rollout. input_ids, attention_mask, position_ids: [b, p + t]; position_ids is None where the
    model counts positions itself. response_ids, response_mask: [b, t]. token_indices: what `tokens` returns; None where it is
    computed on each use.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    response_ids: Tensor
    response_mask: Tensor
    token_indices: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The indices [N] of the N response tokens in a flattened [b, t].

        An index does not make the host wait for a GPU, as a mask does, whose result has a shape that depends on the data.
        """
        return indices(self.response_mask) if self.token_indices is None else self.token_indices

    @property
    def targets(self) -> Tensor:
        """The N response tokens."""
        return self.response_ids.flatten().index_select(0, self.tokens)


def indices(mask: Tensor) -> Tensor:
    """The indices [N] of what a mask keeps, in its flattened shape."""
    return mask.flatten().nonzero().squeeze(1)


class Logged(NamedTuple):
    """What reward functions log of a batch of completions. columns: a value for each completion, by the column's name.
    metrics: the numbers logged, by the metric's name."""

    columns: dict[str, list[Any]]
    metrics: dict[str, list[float]]


class Scored(NamedTuple):
    """A rollout with everything that is fixed before the first optimizer step; [B, T] unless stated.

    micro_batches, old_snapshots: the fixed micro-batches, and π_old at their tokens. ref_snapshots: π_ref there, None
    where neither the loss nor the measurement needs it. logp, ref_logp: log-probabilities of the sampled tokens. ref_kl:
    exact KL(π_old‖π_ref) per context. entropy: of π_old. values: V(state before the token), 0 without a value. loss_mask:
    tokens that get a gradient (the response mask without the rows that have no reward). value_mask: positions whose value is
    trained. scores: [B], NaN where no function gave a reward. rewards: those of each function, [B], NaN where it gave none.
    logged: by the reward functions.

    sampler_logp: log-probabilities of the sampled tokens under the distribution that another engine sampled from; None where
    the policy's own forward pass sampled, or response masks are off. sampler_weights: the importance weights of these tokens,
    from the ratio of π_old to the sampler's distribution; sampler_truncated: where a bound changed one. Both are None where
    nothing is corrected. sampler_finite: whether the sampler's log-probabilities of all processes are finite.
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
    rewards: dict[str, Tensor]
    ref_snapshots: list[PolicySnapshot] | None = None
    logged: Logged = Logged({}, {})
    sampler_logp: Tensor | None = None
    sampler_weights: Tensor | None = None
    sampler_truncated: Tensor | None = None
    sampler_finite: bool = True

    @property
    def without(self) -> str | None:
        """The mechanism that is off, where the update is rerun for attribution."""
        return None if self.rollout.context is None else self.rollout.context.without

    @property
    def context(self) -> UpdateContext:
        """The update's context, which `score` has added to the rollout."""
        if self.rollout.context is None:
            raise ValueError("the rollout has no context; the trainer's `score` gives it one")
        return self.rollout.context


class Groups(NamedTuple):
    """The number of groups of responses to one prompt in a batch, over all processes, and of those without a signal, in which
    every reward is equal or missing."""

    total: int
    without_signal: int


class Batch(NamedTuple):
    """The input of `optimise`: a scored rollout, its advantages (whitened if configured) and returns, both [B, T].

    anchor: measured before the first step. advantage_scale: the factor of whitening, by which the anchor's term in the
    loss is multiplied too. trust_coef: the coefficient λ of the penalty on KL(π_old‖π), relative to these advantages.
    finite: whether all advantages and returns of all processes are finite. groups: None where a value gives the advantages;
    without one the returns are 0.
    """

    scored: Scored
    advantages: Tensor
    returns: Tensor
    anchor: AnchorMeasurement
    advantage_scale: float = 1.0
    trust_coef: float = 0.0
    finite: bool = True
    groups: Groups | None = None

    @property
    def context(self) -> UpdateContext:
        return self.scored.context


class AnchorMeasurement(NamedTuple):
    """The anchor at rollout, gathered from all processes; nats per response.

    coef: the coefficient used. kl: mean by the configured estimator. kl_exact: mean of the exact KL(π‖π_ref) summed over
    a response; kl_stderr: its standard error over responses. share: Σ|A_anchor| / Σ(|A_anchor| + |A_score|) before
    whitening, None where the anchor is not in the reward. kl_per_token: mean over tokens by the configured estimator.
    """

    coef: float
    kl: float
    kl_exact: float
    kl_stderr: float
    share: float | None
    kl_per_token: float


class EpochStats(NamedTuple):
    """Means over the tokens of one PPO epoch (or of all of them), gathered from all processes.

    masked: the share of Σ|w·A| that response masks left out; masked_responses: that of the responses.
    """

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
    masked: float = 0.0
    masked_responses: float = 0.0


class UpdateStats(NamedTuple):
    """What happened between the first and the last optimizer step of one update.

    total: over all epochs; epochs: one entry per epoch begun. steps, planned_steps: optimizer steps taken and planned.
    grad_norm: mean norm of the policy's gradient before clipping; grad_scale: mean factor of clipping. stopped: whether
    the KL limit between mini-batches ended the update. refused: why the update was rejected, or None. norms, value_norms:
    the norm of the gradient of policy and value in each step, before clipping.
    """

    total: EpochStats
    epochs: list[EpochStats]
    steps: int
    planned_steps: int
    grad_norm: float
    grad_scale: float
    stopped: bool
    refused: str | None
    norms: Sequence[float] = ()
    value_norms: Sequence[float] = ()


class RolloutSummary(NamedTuple):
    """The rollout in numbers, gathered from all processes.

    score: mean over the rows that have one, None where none has. length: mean response tokens. eos_rate: share of
    responses that ended with a stop token. entropy: of π_old, nats per token. sampler_kl: k3 of the sampler against the
    training forward pass, nats per token, None without `sampler_logp`. explained_variance: of the returns, by the value,
    NaN without one. rewards: the mean reward of each function, None where it gave none. groups: as in `Batch`.
    sampler_ratio_min, sampler_ratio_max: the smallest and largest ratio of π_old to the sampler's distribution at a sampled
    token, None without `sampler_logp` or without tokens. sampler_truncated: the share of tokens whose importance weight a bound
    changed, None where nothing is corrected. engine: the class of the rollout engine.
    """

    score: float | None
    length: float
    eos_rate: float
    entropy: float
    sampler_kl: float | None
    explained_variance: float
    rewards: dict[str, float | None]
    groups: Groups | None = None
    sampler_ratio_min: float | None = None
    sampler_ratio_max: float | None = None
    sampler_truncated: float | None = None
    engine: str = ""


class ResponseMeasurement(NamedTuple):
    """The responses of a batch under the new policy against π_old.

    moved: Σ_t (w_t − 1) of each response, w = π/π_old at its tokens, in the order of the gathered rows; tokens: how many of its
    tokens count. Over the responses with such a token: kl, the mean sum of KL(π_old‖π), nats per response; tv_positions, the
    mean total variation at each position, 0 after a response's end. tv_max: the largest of any context.
    """

    moved: tuple[float, ...]
    tokens: tuple[int, ...]
    kl: float
    tv_max: float
    tv_positions: tuple[float, ...]


class Measurement(NamedTuple):
    """The batch under the new policy against π_old, gathered from all processes; nats per token.

    kl: mean exact KL(π_old‖π) over the measured contexts; kl_max: the largest; kl_response_max: the largest sum over one
    response. tv: mean total variation. max_ratio and ratio_quantiles: of π/π_old at the sampled tokens. tokens: contexts
    measured; complete: whether these were all. anchor_kl: the mean exact KL(π‖π_ref), summed over a response, nats per
    response; anchor_start: the same of π_old, before the update; None where the reference was not measured. responses: of
    the complete batch, None where it was measured in part.
    """

    kl: float
    kl_max: float
    kl_response_max: float
    tv: float
    max_ratio: float
    ratio_quantiles: dict[str, float]
    tokens: int
    complete: bool
    anchor_kl: float | None = None
    anchor_start: float | None = None
    responses: ResponseMeasurement | None = None


class Enforcement(NamedTuple):
    """The result of enforcement: the KL before it, the scale kept of the step, the number of tries, and the limits.

    scale: None without a limit that is held by backtracking, 0 for an update that was rejected. limit: of the mean KL, in nats
    per token. measured: the batch after enforcement, None where nothing was enforced. rejected: why the update was rolled
    back, or None. limit_token, limit_response: of the largest KL of one token, and of its sum over one response, in nats.
    limit_anchor: of KL(π‖π_ref), in nats per response, the KL before the update where that was larger. decided: the limit that
    determined how much of the step was kept, by the name of its field; None for a step that was not shortened.
    """

    kl_proposed: float
    scale: float | None
    tries: int
    limit: float | None
    measured: Measurement | None = None
    rejected: str | None = None
    limit_token: float | None = None
    limit_response: float | None = None
    limit_anchor: float | None = None
    decided: str | None = None
