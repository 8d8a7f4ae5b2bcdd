"""TRL's trainers: which of them a configuration belongs to, and their logs as records.

They log a KL, clip ratios and the like, averaged since the last log. They do not measure an update, nor the anchor's share
of it. What they do not log is NaN or None here, and null in `bounds.jsonl`. The ratios that GRPO logs with vLLM
(`sampling/importance_sampling_ratio`) are its weights, within their bounds and by default of complete responses. A record has
the ratios of tokens before any bound, so that these are None too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import TrainerState

from .. import bounds
from ..divergences import gradient_kind
from ..records import AnchorRecord, BoundRecord, GradientRecord, SamplerRecord, TrustRecord, ValueRecord
from .trl_trainers import TRLConfig

Kind = Literal["grpo", "rloo", "ppo"]

KL_METRIC: dict[Kind, str] = {"grpo": "kl", "rloo": "kl", "ppo": "objective/kl"}
"""The name under which each trainer logs its KL(π‖π_ref). In nats, gathered from all processes:

grpo: per token. The k3 estimate at the current policy, on tokens that π_old sampled, averaged over the tokens of a
micro-batch, then over the micro-batches. With `use_bias_correction_kl` each token's k3 is multiplied by its ratio π/π_old.
rloo: per token. k1 = log π_old − log π_ref, averaged over the tokens of a generation batch; it can be negative. (The
penalty in the reward is β times its sum over a response.)
ppo: per response. By `kl_estimator` (k1 or k3) at rollout, summed over a response, averaged over the last batch.
"""

ESTIMATOR: dict[Kind, Literal["k1", "k3"]] = {"grpo": "k3", "rloo": "k1"}
"""The estimator of that KL; PPO's is an option."""

TRAINER: dict[Kind, str] = {"grpo": "GRPOTrainer", "rloo": "RLOOTrainer", "ppo": "PPOTrainer"}
"""The names of TRL's trainers in a record."""

KL, TARGET, COEF = "kl/measured", "kl/target", "kl/coef"
"""What `AdaptiveKLCallback` adds to a trainer's logs: the KL and its target in the unit of `KL_METRIC`, and the coefficient
at which that KL was measured."""

_TRAINING: dict[Kind, str] = {"grpo": "loss", "rloo": "loss", "ppo": "objective/kl"}  # only in the logs of training
_CLIPS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # the loss types of GRPO that clip as PPO does


def writes_records(args: Any) -> bool:
    """Whether a configuration belongs to TrustKLPPOTrainer, which has its own records and controllers."""
    return getattr(args, "writes_records", False)


def kind_of(args: Any) -> Kind | None:
    """Which of TRL's trainers a configuration belongs to; None for any other, ours included."""
    from trl import GRPOConfig, RLOOConfig

    from .version import PPOConfig

    if writes_records(args):
        return None
    kinds: dict[Kind, type] = {"grpo": GRPOConfig, "rloo": RLOOConfig, "ppo": PPOConfig}
    return next((kind for kind, config in kinds.items() if isinstance(args, config)), None)


def responses_per_step(args: TRLConfig) -> float:
    """Responses sampled for one optimizer step (of PPO: update), on average: `num_iterations` steps share them."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return batch / getattr(args, "num_iterations", 1)


def episodes_seen(args: TRLConfig, step: int) -> int:
    """Responses sampled by optimizer step `step` (of PPO: update); one that is used repeatedly counts once.

    GRPO and RLOO sample a generation batch for `steps_per_generation` micro-batches, and use it `num_iterations` times.
    """
    accumulated = args.gradient_accumulation_steps
    generation = getattr(args, "steps_per_generation", None) or accumulated
    generations = math.ceil(step * accumulated / (generation * getattr(args, "num_iterations", 1)))
    return generations * generation * args.per_device_train_batch_size * args.world_size


def record_of(args: Any, state: TrainerState, logs: Mapping[str, Any], *, rescaled: bool = True) -> BoundRecord | None:
    """The record of what a trainer of TRL has logged, or None where `logs` is not of training or not of such a trainer.

    A record covers what one log covers: an update with `logging_steps=1`. If `logging_steps` does not divide the number of
    steps, the log that ends the run covers the last ones, without learning rate and gradient norm.

    GRPO and RLOO log nats per token; KL and target are multiplied by the mean length, so that they are nats per response as
    in every record. `trust.gated` is the share of tokens (RLOO: of responses) that the clip left without a gradient, not
    weighted by the advantage. `binding` is the largest of the known shares, or "unknown" if all known shares are below
    1 % and at least one share is unknown. rescaled: whether the optimizer rescales gradients; see `bounds.binding`.
    """
    kind = kind_of(args)
    if kind is None or not (_TRAINING[kind] in logs or _of_last_steps(kind, logs)):
        return None
    return record_of_update(kind, args, logs, update=state.global_step, history=state.log_history, rescaled=rescaled)


def record_of_update(
    kind: Kind,
    args: Any,
    logs: Mapping[str, Any],
    *,
    update: int,
    rescaled: bool,
    history: Sequence[Mapping[str, Any]] = (),
) -> BoundRecord:
    """The record of the numbers in `logs`; see `record_of`. history: earlier logs, where these lack a number that stays."""
    ppo = kind == "ppo"
    score, step_time = _known(logs, "objective/scores" if ppo else "reward"), _known(logs, "step_time")
    length = _latest(history, logs, "completions/mean_length")
    coef = _latest(history, logs, COEF)
    if math.isnan(coef):
        coef = args.kl_coef if ppo else args.beta
    anchor = _anchor(kind, args, logs, coef, 1.0 if ppo else length)
    trust, gradient = _trust(kind, args, logs), _gradient(kind, args, logs)
    value = ValueRecord(args.cliprange_value if ppo else None, _known(logs, "val/clipfrac_avg"), math.nan)
    shares = {"anchor": 0.0 if coef == 0 else math.nan, "clip": trust.gated, "grad_norm": 1.0 - gradient.scale}
    return BoundRecord(
        update=update, episode=episodes_seen(args, update),
        score=None if math.isnan(score) else score,
        length=length,
        eos_rate=1.0 - _known(logs, "completions/clipped_ratio"),
        entropy=_known(logs, "policy/entropy_avg" if ppo else "entropy"),
        lr=_known(logs, "lr" if ppo else "learning_rate"),
        refused=None,
        seconds={} if math.isnan(step_time) else {"total": step_time},
        anchor=anchor, trust=trust, value=value, gradient=gradient, sampler=SamplerRecord(kl=None),
        binding=binding(shares, rescaled=rescaled), rewards=_rewards(logs), trainer=TRAINER[kind],
    )  # fmt: skip


def binding(shares: Mapping[str, float], *, rescaled: bool) -> str:
    """The mechanism with the largest of the known shares; "unknown" if these are below 1 % and a share is NaN. rescaled: see
    `bounds.binding`."""
    known = bounds.binding(dict(shares), rescaled=rescaled)
    return "unknown" if known == "none" and any(map(math.isnan, shares.values())) else known


def _rewards(logs: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The mean reward of each function, which GRPO and RLOO log as `rewards/NAME/mean`."""
    named = {key.split("/", 1)[1].rpartition("/")[0]: key for key in logs if re.fullmatch("rewards/.+/mean", key)}
    return {name: None if math.isnan(_known(logs, key)) else _known(logs, key) for name, key in named.items()} or None


def _of_last_steps(kind: Kind, logs: Mapping[str, Any]) -> bool:
    """Whether the log that ends a run of GRPO or RLOO has the metrics of steps since the last log of training."""
    return (
        kind != "ppo"
        and "train_runtime" in logs
        and any(key.startswith(("clip_ratio", "completions/")) for key in logs)
    )


def _known(logs: Mapping[str, Any], key: str) -> float:
    """A number of the logs; NaN where they have none: TRL logs None for the average of nothing."""
    value = logs.get(key)
    return math.nan if value is None else float(value)


def _latest(history: Sequence[Mapping[str, Any]], logs: Mapping[str, Any], key: str) -> float:
    """A number from these logs, or from the most recent logs that had it: a step that reuses a generation does not log it
    again."""
    return _known(next((each for each in (logs, *reversed(history)) if key in each), {}), key)


def _anchor(kind: Kind, args: TRLConfig, logs: Mapping[str, Any], coef: float, per_response: float) -> AnchorRecord:
    """per_response: the factor that makes the logged KL nats per response."""
    ppo, target, kl = kind == "ppo", _known(logs, TARGET), _known(logs, KL_METRIC[kind])
    estimator, placement = args.kl_estimator if ppo else ESTIMATOR[kind], "loss" if kind == "grpo" else "reward"
    # Multiplied by the ratio, k3 has the gradient of the KL on the contexts of the batch, as an exact KL in the loss has.
    corrected = getattr(args, "use_bias_correction_kl", False)
    return AnchorRecord(
        estimator, placement, gradient=gradient_kind("exact" if corrected else estimator, placement),
        coef=coef,
        target=None if math.isnan(target) else target * per_response,
        kl=kl * per_response, kl_exact=math.nan, kl_stderr=math.nan,
        kl_per_token=math.nan if ppo else kl,
        target_per_token=None if ppo or math.isnan(target) else target,
        share=None,
    )  # fmt: skip


def _trust(kind: Kind, args: TRLConfig, logs: Mapping[str, Any]) -> TrustRecord:
    rule, low, high = _clip(kind, args)
    # With GRPO's Liger loss the name is "clip_ratio".
    names = ("policy/clipfrac_avg",) if kind == "ppo" else ("clip_ratio/region_mean", "clip_ratio")
    return TrustRecord(
        rule=rule, low=low, high=high,
        gated=next((_known(logs, name) for name in names if name in logs), math.nan),
        gated_low=_known(logs, "clip_ratio/low_mean"),
        gated_high=_known(logs, "clip_ratio/high_mean"),
        coef=0.0,
        epochs=float(args.num_ppo_epochs if kind == "ppo" else args.num_iterations),
        stopped=False,
        kl=math.nan, kl_max=math.nan, kl_response_max=math.nan, kl_proposed=math.nan, tv=math.nan, max_ratio=math.nan,
        ratio_quantiles={},
        scale=None, tries=0, limit=None, guaranteed=None,
    )  # fmt: skip


def _clip(kind: Kind, args: TRLConfig) -> tuple[str, float, float]:
    """(rule, low, high): the range of the ratio is [1 − low, 1 + high], NaN where the rule has no such bound."""
    if kind == "ppo":
        return "ppo", args.cliprange, args.cliprange
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if any(each.__name__ == "GMPOConfig" for each in type(args).__mro__):  # of trl.experimental; it clips the log-ratio
        return "gmpo", -math.expm1(-args.epsilon), math.expm1(high)
    loss = args.loss_type if kind == "grpo" else "grpo"
    if loss in _CLIPS:
        # "sequence_token" is GSPO-token of trl.experimental: a token's gradient with the ratio of its sequence.
        sequences = kind == "grpo" and args.importance_sampling_level in ("sequence", "sequence_token")
        # GRPO's `delta` caps the ratio of tokens with a negative advantage, as dual-clip PPO does.
        token_rule = "ppo" if getattr(args, "delta", None) is None else "dual"
        return "gspo" if sequences else token_rule, args.epsilon, high
    # CISPO's epsilon_high is the largest weight itself, not its distance from 1.
    return loss, math.nan, high - 1.0 if loss == "cispo" else math.nan


def _gradient(kind: Kind, args: TRLConfig, logs: Mapping[str, Any]) -> GradientRecord:
    if kind == "ppo":  # it has max_grad_norm, but does not apply it
        return GradientRecord(norm=math.nan, max_norm=None, scale=1.0)
    norm, max_norm = _known(logs, "grad_norm"), args.max_grad_norm or None
    if max_norm is None or math.isnan(norm):
        return GradientRecord(norm, max_norm, 1.0 if max_norm is None else math.nan)
    return GradientRecord(norm, max_norm, min(1.0, max_norm / (norm + 1e-6)))
