"""TRL's own trainers: which of them a configuration belongs to, and what their logs say in the words of a record.

They log a KL, clip ratios and the like, as averages over what has happened since the last log; they measure no update and
keep no share of the anchor. What they do not expose is NaN or None here, null in `bounds.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from transformers import TrainerState

from .. import bounds
from ..divergences import gradient_kind
from ..records import AnchorRecord, BoundRecord, GradientRecord, SamplerRecord, TrustRecord, ValueRecord
from .trl_trainers import TRLConfig

Kind = Literal["grpo", "rloo", "ppo"]

KL_METRIC: dict[Kind, str] = {"grpo": "kl", "rloo": "kl", "ppo": "objective/kl"}
"""Under which name each trainer logs its KL(π‖π_ref). In nats, gathered from all processes:

grpo: per token. The k3 estimate at the policy of this very step, on tokens that π_old sampled, averaged over the tokens of
a micro-batch, then over the micro-batches. With `use_bias_correction_kl` each token's k3 is multiplied by its ratio π/π_old.
rloo: per token. k1 = log π_old − log π_ref, averaged over the tokens of a generation batch; it can be negative. (The
penalty in the reward is β times its sum over a response.)
ppo: per response. By `kl_estimator` (k1 or k3) at rollout, summed over a response, averaged over the last batch.
"""

KL, TARGET, COEF = "kl/measured", "kl/target", "kl/coef"
"""What `AdaptiveKLCallback` adds to a trainer's logs; unit of `KL_METRIC`, `kl/coef` being the coefficient it was had with."""

_TRAINING: dict[Kind, str] = {
    "grpo": "loss",
    "rloo": "loss",
    "ppo": "objective/kl",
}  # in every log of training, in no other
_CLIPS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # the loss types of GRPO that clip as PPO does


def writes_records(args: Any) -> bool:
    """Whether a configuration is that of TrustKLPPOTrainer, which has records and controllers of its own."""
    return getattr(args, "writes_records", False)


def kind_of(args: Any) -> Kind | None:
    """Which of TRL's trainers a configuration belongs to; None for any other, ours included."""
    from trl import GRPOConfig, RLOOConfig

    from .version import PPOConfig

    if writes_records(args):
        return None
    kinds: dict[Kind, type] = {"grpo": GRPOConfig, "rloo": RLOOConfig, "ppo": PPOConfig}
    return next((kind for kind, config in kinds.items() if isinstance(args, config)), None)


def episodes_seen(args: TRLConfig, step: int) -> int:
    """Responses sampled up to optimizer step `step` (of PPO: update), a response counted once however often it is used."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return step * batch // getattr(args, "num_iterations", 1)


def record_of(args: Any, state: TrainerState, logs: Mapping[str, Any]) -> BoundRecord | None:
    """The record of what a stock trainer has logged, or None where `logs` is not of training or not of such a trainer.

    One record is what one log covers: an update with `logging_steps=1`. GRPO and RLOO log nats per token; KL and target
    are multiplied by the mean length, to be nats per response as in every record. `trust.gated` is the share of tokens
    (RLOO: of responses) that the clip left without a gradient, not weighted by the advantage. `binding` is drawn from
    the shares that are known, and "unknown" where these are all below 1 % and another mechanism was on.
    """
    kind = kind_of(args)
    if kind is None or _TRAINING[kind] not in logs:
        return None
    ppo = kind == "ppo"
    score, step_time = _known(logs, "objective/scores" if ppo else "reward"), _known(logs, "step_time")
    length = _latest(state, logs, "completions/mean_length")
    coef = _latest(state, logs, COEF)
    if math.isnan(coef):
        coef = args.kl_coef if ppo else args.beta
    anchor = _anchor(kind, args, logs, coef, 1.0 if ppo else length)
    trust, gradient = _trust(kind, args, logs), _gradient(kind, args, logs)
    return BoundRecord(
        update=state.global_step,
        episode=episodes_seen(args, state.global_step),
        score=None if math.isnan(score) else score,
        length=length,
        eos_rate=1.0 - _known(logs, "completions/clipped_ratio"),
        entropy=_known(logs, "policy/entropy_avg" if ppo else "entropy"),
        lr=_known(logs, "lr" if ppo else "learning_rate"),
        refused=None,
        seconds={} if math.isnan(step_time) else {"total": step_time},
        anchor=anchor,
        trust=trust,
        value=ValueRecord(
            clip=args.cliprange_value if ppo else None,
            gated=_known(logs, "val/clipfrac_avg"),
            explained_variance=math.nan,
        ),
        gradient=gradient,
        sampler=SamplerRecord(kl=None),
        binding=_binding({
            "anchor": 0.0 if anchor.coef == 0 else math.nan,
            "clip": trust.gated,
            "grad_norm": 1.0 - gradient.scale,
        }),
    )  # fmt: skip


def _known(logs: Mapping[str, Any], key: str) -> float:
    """A number of the logs; NaN where they have none: TRL logs None for the average of nothing."""
    value = logs.get(key)
    return math.nan if value is None else float(value)


def _latest(state: TrainerState, logs: Mapping[str, Any], key: str) -> float:
    """A number of these logs, or of the last ones that had it: a step that reuses a generation logs nothing of that."""
    return _known(next((each for each in (logs, *reversed(state.log_history)) if key in each), {}), key)


def _anchor(kind: Kind, args: TRLConfig, logs: Mapping[str, Any], coef: float, per_response: float) -> AnchorRecord:
    """per_response: what turns the logged KL into nats per response."""
    target = _known(logs, TARGET) * per_response
    estimator, placement = {"grpo": ("k3", "loss"), "rloo": ("k1", "reward")}.get(kind) or (args.kl_estimator, "reward")
    # The ratio before k3 makes its gradient that of the KL on the contexts of the batch, as with an exact KL in the loss.
    corrected = getattr(args, "use_bias_correction_kl", False)
    return AnchorRecord(
        estimator=estimator,
        placement=placement,
        gradient=gradient_kind("exact" if corrected else estimator, placement),
        coef=coef,
        target=None if math.isnan(target) else target,
        kl=_known(logs, KL_METRIC[kind]) * per_response,
        kl_exact=math.nan,
        kl_stderr=math.nan,
        share=None,
    )


def _trust(kind: Kind, args: TRLConfig, logs: Mapping[str, Any]) -> TrustRecord:
    rule, low, high = _clip(kind, args)
    # "clip_ratio" alone is the name of GRPO's Liger loss.
    names = ("policy/clipfrac_avg",) if kind == "ppo" else ("clip_ratio/region_mean", "clip_ratio")
    return TrustRecord(
        rule=rule,
        low=low,
        high=high,
        gated=next((_known(logs, name) for name in names if name in logs), math.nan),
        gated_low=_known(logs, "clip_ratio/low_mean"),
        gated_high=_known(logs, "clip_ratio/high_mean"),
        coef=0.0,
        epochs=float(args.num_ppo_epochs if kind == "ppo" else args.num_iterations),
        stopped=False,
        kl=math.nan,
        kl_max=math.nan,
        kl_proposed=math.nan,
        tv=math.nan,
        max_ratio=math.nan,
        ratio_quantiles={},
        scale=None,
        tries=0,
        limit=None,
        guaranteed=None,
    )


def _clip(kind: Kind, args: TRLConfig) -> tuple[str, float, float]:
    """(rule, low, high): the range of the ratio is [1 − low, 1 + high], NaN where the rule has no such bound."""
    if kind == "ppo":
        return "ppo", args.cliprange, args.cliprange
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    loss = args.loss_type if kind == "grpo" else "grpo"
    if loss in _CLIPS:
        sequences = kind == "grpo" and args.importance_sampling_level == "sequence"
        return "gspo" if sequences else "ppo", args.epsilon, high
    # CISPO's epsilon_high is the largest weight itself, not its distance from 1.
    return loss, math.nan, high - 1.0 if loss == "cispo" else math.nan


def _gradient(kind: Kind, args: TRLConfig, logs: Mapping[str, Any]) -> GradientRecord:
    if kind == "ppo":  # it has max_grad_norm, and does not apply it
        return GradientRecord(norm=math.nan, max_norm=None, scale=1.0)
    norm, max_norm = _known(logs, "grad_norm"), args.max_grad_norm or None
    if max_norm is None:
        return GradientRecord(norm, None, 1.0)
    return GradientRecord(norm, max_norm, math.nan if math.isnan(norm) else min(1.0, max_norm / (norm + 1e-6)))


def _binding(shares: dict[str, float]) -> str:
    found = bounds.binding(shares)
    return "unknown" if found == "none" and any(math.isnan(share) for share in shares.values()) else found
