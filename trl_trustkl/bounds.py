"""The record of what bounded an update: gated, measured, guaranteed, binding.

These words are kept apart: what a mechanism *gated* (the share of the gradient it removed), what was *measured* after the
step, and what is *guaranteed*: only what backtracking enforced on this batch.

Below the record are bounds from the literature: what a trust region would guarantee if its premise held in every context,
not only in those of a batch. They need neither a model nor a record, and each docstring states how loose the bound is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .divergences import gradient_kind
from .errors import out_of_range
from .options import NOT_NEGATIVE, Range
from .records import (
    AdvantageRecord,
    AnchorRecord,
    BoundRecord,
    CertificateRecord,
    GradientRecord,
    RolloutRecord,
    SamplerRecord,
    TrustRecord,
    ValueRecord,
)
from .surrogates import WITHOUT_RANGE
from .types import AnchorMeasurement, Enforcement, Measurement, RolloutSummary, UpdateStats

BINDING_THRESHOLD = 0.01
"""The smallest share of an update with which a mechanism counts as having bound it."""


def binding_shares(
    anchor: AnchorMeasurement, stats: UpdateStats, enforcement: Enforcement, lr_factor: float
) -> dict[str, float]:
    """The share of the update in which each mechanism intervened, in [0, 1].

    It does not measure the outcome: under Adam, the factor of `grad_norm` hardly changes the update.

    anchor: its share of the absolute advantage. clip: the share of the gradient's weight that the rule gated. response_mask:
    the share of this weight in responses that were left out. penalty: Σ λ|w − 1| / Σ (λ|w − 1| + |w·A|), its pull on the
    sampled tokens against the surrogate's. stop: the share of the planned optimizer steps left out. backtrack: 1 − scale.
    grad_norm: 1 − the mean factor of clipping. lr: 1 − the factor of the learning rate by KL on the scheduled one, where
    that is below 1.
    """
    left_out = 1.0 - stats.steps / stats.planned_steps if stats.stopped and stats.planned_steps else 0.0
    return {
        "anchor": anchor.share or 0.0,
        "clip": stats.total.gated,
        "response_mask": stats.total.masked,
        "penalty": stats.total.penalty,
        "stop": left_out,
        "backtrack": 0.0 if enforcement.scale is None else 1.0 - enforcement.scale,
        "grad_norm": 1.0 - stats.grad_scale,
        "lr": max(0.0, 1.0 - lr_factor),
    }


def binding(shares: dict[str, float], *, rescaled: bool = False) -> str:
    """The mechanism with the largest share, "none" below 1 %; shares of NaN are ignored.

    rescaled: whether the optimizer rescales gradients. The factor of `grad_norm` is then not a share of the update.
    """
    return _largest({name: share for name, share in shares.items() if not (rescaled and name == "grad_norm")})


def binding_by_outcome(kl: float, counterfactual: dict[str, float | None]) -> str:
    """The mechanism without which the KL(π_old‖π) of an update would have been largest, "none" if it would have grown by less
    than 1 % of that. kl: as it was; counterfactual: without each mechanism."""
    removed = {name: 1.0 - kl / without for name, without in counterfactual.items() if without}
    return _largest(removed)


def _largest(shares: dict[str, float]) -> str:
    known = {name: share for name, share in shares.items() if share >= BINDING_THRESHOLD}
    return max(known, key=known.__getitem__, default="none")


class Guarantees(NamedTuple):
    """What backtracking enforced on the contexts of a batch, None for a limit that was not enforced: the mean KL(π_old‖π), in
    nats per token; the largest of one token, and the largest sum over one response, in nats; KL(π‖π_ref) in nats per response.
    """

    mean: float | None
    token: float | None
    response: float | None
    anchor: float | None


def guarantees(measurement: Measurement, enforcement: Enforcement) -> Guarantees:
    """Each limit that was enforced on the complete batch, and that the measurement is within."""
    pairs = (
        (measurement.kl, enforcement.limit),
        (measurement.kl_max, enforcement.limit_token),
        (measurement.kl_response_max, enforcement.limit_response),
        (measurement.anchor_kl, enforcement.limit_anchor),
    )
    held = (
        limit if limit is not None and value is not None and measurement.complete and value <= limit else None
        for value, limit in pairs
    )
    return Guarantees(*held)


def build_record(args: Any, *, update: int, episode: int, lr: float, lr_factor: float, trust_coef: float,
                 refused: str | None, seconds: dict[str, float], rollout: RolloutSummary, anchor: AnchorMeasurement,
                 stats: UpdateStats, measured: Measurement, enforcement: Enforcement, rescaled: bool = False,
                 counterfactual: dict[str, float | None] | None = None,
                 renewed: bool | None = None, certificate: CertificateRecord | None = None) -> BoundRecord:  # fmt: skip
    """The record of one update; `args` is the run's configuration (a TrustKLPPOConfig). rescaled: see `binding`."""
    shares = None if refused is not None else binding_shares(anchor, stats, enforcement, lr_factor)
    return BoundRecord(
        update=update, episode=episode,
        score=rollout.score, length=rollout.length, eos_rate=rollout.eos_rate, entropy=rollout.entropy,
        lr=lr, refused=refused, seconds=seconds,
        anchor=AnchorRecord(
            args.kl_estimator, args.kl_placement, gradient_kind(args.kl_estimator, args.kl_placement),
            target=args.kl_target, target_per_token=None, renewed=renewed, limit=args.anchor_max_kl,
            kl_after=measured.anchor_kl, guaranteed=guarantees(measured, enforcement).anchor, **anchor._asdict(),
        ),
        trust=_trust_record(args, trust_coef, stats, measured, enforcement)._replace(certificate=certificate),
        value=_value_record(args, stats, rollout),
        gradient=GradientRecord(norm=stats.grad_norm, max_norm=args.norm_limit, scale=stats.grad_scale),
        sampler=SamplerRecord(
            rollout.sampler_kl, rollout.sampler_ratio_min, rollout.sampler_ratio_max, rollout.sampler_truncated
        ),
        binding=_binding(shares, measured.kl, counterfactual, rescaled),
        shares=shares,
        rewards=rollout.rewards,
        counterfactual=counterfactual,
        trainer="TrustKLPPOTrainer",
        advantage=_advantage_record(args, rollout),
        rollout=RolloutRecord(rollout.engine),
    )  # fmt: skip


def _binding(
    shares: dict[str, float] | None, kl: float, counterfactual: dict[str, float | None] | None, rescaled: bool
) -> str:
    if shares is None:
        return "none"
    return binding(shares, rescaled=rescaled) if counterfactual is None else binding_by_outcome(kl, counterfactual)


def _value_record(args: Any, stats: UpdateStats, rollout: RolloutSummary) -> ValueRecord:
    if rollout.groups is not None:
        return ValueRecord(None, math.nan, math.nan)
    return ValueRecord(args.value_range, stats.total.value_gated, rollout.explained_variance)


def _advantage_record(args: Any, rollout: RolloutSummary) -> AdvantageRecord | None:
    if rollout.groups is None:
        return None
    groups = rollout.groups
    return AdvantageRecord(args.advantage_estimator, args.num_generations, groups.total, groups.without_signal)


def _trust_record(
    args: Any, coef: float, stats: UpdateStats, measured: Measurement, enforcement: Enforcement
) -> TrustRecord:
    ranged, held = args.clip_rule not in WITHOUT_RANGE, guarantees(measured, enforcement)
    return TrustRecord(
        rule=args.clip_rule,
        low=args.low if ranged else math.nan,
        high=args.high if ranged else math.nan,
        gated=stats.total.gated, gated_low=stats.total.gated_low, gated_high=stats.total.gated_high,
        coef=coef,
        epochs=args.num_ppo_epochs * stats.steps / stats.planned_steps,
        stopped=stats.stopped,
        kl=measured.kl, kl_max=measured.kl_max, kl_response_max=measured.kl_response_max,
        kl_proposed=enforcement.kl_proposed, tv=measured.tv,
        max_ratio=measured.max_ratio, ratio_quantiles=measured.ratio_quantiles,
        scale=enforcement.scale, tries=enforcement.tries, limit=enforcement.limit,
        guaranteed=held.mean,
        limit_token=enforcement.limit_token, limit_response=enforcement.limit_response,
        guaranteed_token=held.token, guaranteed_response=held.response, decided=enforcement.decided,
        mask_limit=args.response_mask_kl, masked=stats.total.masked, masked_responses=stats.total.masked_responses,
    )  # fmt: skip


# -- What a trust region would guarantee -------------------------------------------------------------------------------
#
# μ = π_old samples responses of T = `horizon` tokens, R is the score of a response, J(π) = E_π[R], w_t = π/μ at token t,
# and L(π) = E_μ[R·Σ_t (w_t − 1)] is the surrogate whose gradient at π = μ is the policy gradient. The first five functions
# bound its error |J(π) − J(μ) − L(π)|, so that J(π) ≥ J(μ) + L(π) − bound; the unit is that of the score.
#
# A maximum is over every context (prompt and the tokens so far) that μ or π can reach. `trust.kl_max` of a record is over
# the contexts of one batch: with it a bound is an indication, not a guarantee. Looseness was measured on enumerated trees
# of 2 and 3 tokens and 2 to 5 positions, random ones and some made or optimised to be bad (tests/test_bounds.py). All
# functions raise ConfigError for an argument out of its range.

_RANGES = {
    "horizon": Range("an integer >= 1", lambda x: x >= 1 and x % 1 == 0),
    "tv_max": Range("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "tv_sequence": Range("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "epsilon": Range("a number in [0, 1)", lambda x: 0 <= x < 1),
    "gamma": Range("a number in [0, 1)", lambda x: 0 <= x < 1),
}


def _check(**arguments: float) -> None:
    for name, value in arguments.items():
        range = _RANGES.get(name, NOT_NEGATIVE)
        if not (math.isfinite(value) and range.holds(value)):
            raise out_of_range(name, value, range.valid)


def finite_horizon_tv_bound(horizon: int, tv_max: float, reward_max: float) -> float:
    """2ξT(T − 1)·TV²: bounds the surrogate's error by the largest total variation TV(μ, π) of any context.

    Policy improvement at a finite horizon (arXiv 2602.04879, after arXiv 1502.05477). horizon: T, tokens; tv_max: in [0,
    1]; reward_max: ξ = max |R|, or half of R's range, as a constant added to R changes neither side. Looseness: the
    error reaches at most 81 % on random trees, 1 % in the median; bad ones attain it at T = 2, and reach 88 % at T = 3.
    """
    _check(horizon=horizon, tv_max=tv_max, reward_max=reward_max)
    return 2 * reward_max * horizon * (horizon - 1) * tv_max**2


def finite_horizon_sum_bound(expected_tv_sum: float, reward_max: float) -> float:
    """4ξ·E_μ[Σ_t TV_t]: bounds the surrogate's error by the total variation summed along a response, in expectation.

    Same source. It is of first order in TV and the error of second, so it is the smaller bound only for large steps or long
    responses. expected_tv_sum: over contexts that μ visits, so a batch estimates it without bias: `trust.tv` × `length`.
    reward_max: ξ, as above. Looseness: at most 34 % on random trees, 1 % in the median; bad ones reach 50 %, and no search
    found more.
    """
    _check(expected_tv_sum=expected_tv_sum, reward_max=reward_max)
    return 4 * reward_max * expected_tv_sum


def finite_horizon_bound(horizon: int, tv_max: float, expected_tv_sum: float, reward_max: float) -> float:
    """The smaller of the two above, with the premises of both."""
    by_maximum = finite_horizon_tv_bound(horizon, tv_max, reward_max)
    return min(by_maximum, finite_horizon_sum_bound(expected_tv_sum, reward_max))


def masking_bound(horizon: int, kl_max: float, kl_sequence: float | None = None) -> float:
    """min of T(T − 1)·D, (4/3)T^1.5·D and 2T·√(D·D_seq): bounds the surrogate's error by KL(μ‖π), for R in [0, 1].

    Trust Region Masking (arXiv 2512.23075): the classical, the Pinsker-marginal and the mixed bound. horizon: T, tokens;
    kl_max: D, the largest KL(μ‖π) of any context, in nats; kl_sequence: D_seq, KL(μ‖π) of complete responses, in nats;
    None leaves out the third bound. For another range of R multiply by its width. Looseness: at most 29 % on random trees,
    1 % in the median; bad ones reach 50 % and none can exceed it, as |R − ½| ≤ ½, which the proofs do not use.
    """
    _check(horizon=horizon, kl_max=kl_max)
    bounds = [horizon * (horizon - 1) * kl_max, 4 / 3 * horizon**1.5 * kl_max]
    if kl_sequence is not None:
        _check(kl_sequence=kl_sequence)
        bounds.append(2 * horizon * math.sqrt(kl_max * kl_sequence))
    return min(bounds)


class ErrorBounds(NamedTuple):
    """Bounds on the surrogate's error by their names, in the unit of the score; see `error_bounds`."""

    classical: float
    pinsker_marginal: float
    mixed: float
    classical_tv: float
    mixed_tv: float
    adaptive: float


def error_bounds(horizon: int, *, kl_max: float, kl_sequence: float, tv_max: float, tv_sequence: float,
                 tv_positions: Sequence[float], width: float = 1.0) -> ErrorBounds:  # fmt: skip
    """Six bounds on the surrogate's error: ½T(T − 1)·D, ⅔T^1.5·D, (T − 1)·√(D·D_seq), T(T − 1)·TV², 2(T − 1)·TV·TV_seq and
    2·Σ_t E_μ[TV_t]·min(1, (T − t)·TV, √((T − t)·D/2)), each × the width of R's range.

    After Trust Region Masking (arXiv 2512.23075v5), by the names of its bounds: classical, Pinsker-marginal and mixed in KL,
    classical and mixed in TV, adaptive. The constants are those of the proofs below; the first three are at most half of those
    of `masking_bound`. For R in [0, 1], V^π(h) and V^μ(h) the expected R after the tokens h, d_t the distribution of the first
    t tokens, and TV² ≤ KL/2 (Pinsker):

    - ∏w − 1 − Σ(w_t − 1) = Σ_t (w_t − 1)(∏_{s>t} w_s − 1), so the error is Σ_t E_μ[(w_t − 1)(V^π − V^μ)(h_t)]. Given the
      tokens before t, E_μ|w_t − 1| = 2·TV_t. |V^π − V^μ| is at most the total variation of the T − t tokens that follow,
      which the minimum bounds: adaptive. TV_t ≤ √(D/2) makes it Pinsker-marginal, as Σ_t √(T − t) ≤ ⅔T^1.5.
    - The same sum is Σ_t (E_π − E_μ)[g_t(h)] over h of d_{t−1}, g_t = Σ_a (π − μ)(a|h)·V^μ(h, a), and |g_t| ≤ TV. So the error
      is at most Σ_t 2·TV(d_{t−1})·TV, and TV(d_{t−1}) at most (t − 1)·TV, TV_seq and √(D_seq/2): the other bounds.

    horizon: T, tokens. kl_max, kl_sequence: D and D_seq, as above, in nats. tv_max, tv_sequence: TV and TV_seq, the total
    variation between μ and π of a context, at most, and of complete responses. tv_positions: E_μ[TV_t] for t = 1, 2, …, 0 after
    a response's end; may end before T. Looseness: the error reaches at most 51, 27, 41, 72, 66 and 89 % on random trees, in
    this order; bad ones attain all but Pinsker-marginal (53 %) and mixed (71 %), each at T = 2.
    """
    _check(horizon=horizon, kl_max=kl_max, kl_sequence=kl_sequence, tv_max=tv_max, tv_sequence=tv_sequence, width=width)
    if len(tv_positions) > horizon:
        raise out_of_range("horizon", horizon, f"at least the number of `tv_positions`, {len(tv_positions)}")
    after = horizon - 1
    adaptive = 0.0
    for t, tv in enumerate(tv_positions, start=1):
        left = horizon - t
        adaptive += 2 * tv * min(1.0, left * tv_max, math.sqrt(left * kl_max / 2))
    return ErrorBounds(
        classical=width * horizon * after * kl_max / 2,
        pinsker_marginal=width * 2 / 3 * horizon**1.5 * kl_max,
        mixed=width * after * math.sqrt(kl_max * kl_sequence),
        classical_tv=width * horizon * after * tv_max**2,
        mixed_tv=width * 2 * after * tv_max * tv_sequence,
        adaptive=width * adaptive,
    )


class RatioRangeBounds(NamedTuple):
    """Of one context: tv, the total variation; kl, KL(π_old‖π) in nats."""

    tv: float
    kl: float


def ratio_range_bounds(epsilon: float) -> RatioRangeBounds:
    """TV ≤ ε/2 and KL(π_old‖π) ≤ −½·log(1 − ε²), if 1 − ε ≤ π/π_old ≤ 1 + ε for every token of the vocabulary.

    At ε = 0.2: 0.1 and 0.0204 nats per token. PPO does not enforce that premise: its clip does not limit tokens that were
    not sampled, and passes the full gradient while a ratio is inside the range, 1 included, however long the step is.
    Both follow from convexity in the ratio, and are attained by two tokens of probability ½ that move to (1 ± ε)/2.
    """
    _check(epsilon=epsilon)
    return RatioRangeBounds(epsilon / 2, -math.log1p(-(epsilon**2)) / 2)


def trpo_penalty_coef(advantage_max: float, gamma: float) -> float:
    """C = 4εγ/(1 − γ)², with which J(π) ≥ L(π) − C·max KL(μ‖π) (TRPO, arXiv 1502.05477, theorem 1).

    For discounted returns without a horizon, where L(π) = J(μ) + the advantages under μ of π's actions, in the states that
    μ visits. advantage_max: ε = max |A_μ|; gamma: in [0, 1). The steps that it allows are too short in practice, where the
    KL is limited instead. Looseness: at most 3 % on random trees.
    """
    _check(advantage_max=advantage_max, gamma=gamma)
    return 4 * advantage_max * gamma / (1 - gamma) ** 2
