"""Findings: problems that a run's records show, each with the evidence and a change of the configuration.

Each is a function of a run that returns a `Finding`, or None if the records do not show it or the run is too short to tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from ..records import BoundRecord
from .advice import FEW, Finding, configured_lr, of_updates, set_limit, set_lr, weaker_anchor
from .limit_findings import anchor_blocks, limit_decides
from .mask_findings import masks_act_too_late, masks_leave_out_most
from .outcome_findings import (
    anchor_pulls_more_than_reward,
    clip_halves_updates,
    grad_norm_without_effect,
    updates_go_further,
)
from .sampler_findings import sampler_differs, weights_truncated
from .schema import Run
from .series import (
    Column,
    column,
    distance,
    first_third,
    is_from_trl,
    largest,
    last_third,
    mean,
    of_groups,
    quantile,
    reference_per_token,
    stderr,
    stop_share,
    to_reference,
    token_range,
)
from .text import count, number, percent, shortened

SOME = 6  # updates at least for comparing thirds of a run
IDLE = 1e-6  # a gated share up to this counts as none
NEAR = 0.25  # a KL within this distance of its target, relative to it, counts as at the target
BAND = 1.5  # within [target / BAND, target · BAND] a controller may leave its coefficient unchanged
FAR = 2.0  # a ratio outside the clip range by this factor is far outside
NEGATIVE_SHARE = 0.1  # of the updates; chance makes fewer estimates negative once the policy has moved
MISMATCH = 0.005  # nats per token between sampler and training pass; rounding stays below
LR_FLOOR = 1 / 32  # the smallest factor that trust_lr_target applies to the scheduled learning rate
FLOOR_SHARE = 0.2  # of the updates; a schedule that decays to zero spends less than this below the floor
COLLAPSE = 0.5  # nats per token; text whose tokens are this much less likely is a different kind of text
NOTHING = 0.05  # share of the returns' variance; explaining less counts as nothing


def clip_never_binds(run: Run) -> Finding | None:
    clipped = [record for record in run.records if record.trust.rule != "none" and record.refused is None]
    if len(clipped) < FEW or not (column(clipped, "trust.gated") <= IDLE).all():  # NaN is not 0
        return None
    reached = largest(column(clipped, "trust.max_ratio"))
    made, from_trl = count(len(clipped), "update"), is_from_trl(run.records)
    if of_groups(run.records) and all(record.trust.epochs <= 1 for record in clipped):
        return None if _all_limited(clipped) else _epsilon_has_no_effect(run, made, reached)
    if all(record.trust.epochs <= 1 for record in clipped):
        return Finding(
            "clip_never_binds",
            "Clipping is on but cannot act",
            f"The clip removed nothing in any of {made}, each of them a single pass over its batch. In a single pass with one "
            "mini-batch, the policy is still the one that sampled when the clip is applied, so every ratio is 1."
            + (f" Measured after the step, the largest was {number(reached)}." if np.isfinite(reached) else ""),
            "Set num_iterations=2, or for PPO num_ppo_epochs=2."
            if from_trl
            else "Set num_ppo_epochs=2 (or num_mini_batches=2); to bound a single step, set trust_max_kl instead.",
        )
    return Finding(
        "clip_never_binds",
        "Clipping is on but never acted",
        f"The clip removed nothing in any of {made}"
        + (f"; the largest ratio measured after a step was {number(reached)}" if np.isfinite(reached) else "")
        + f". The updates are too small for {_its_limit(clipped[-1])} to matter.",
        set_lr(run, 2, "twice the present one") + ".",
    )


def _its_limit(record: BoundRecord) -> str:
    return "the clip range" if np.isfinite(column([record], "trust.high")[0]) else f"clip_rule={record.trust.rule!r}"


def _all_limited(records: list[BoundRecord]) -> bool:
    guarantees = (
        (record.trust.guaranteed, record.trust.guaranteed_token, record.trust.guaranteed_response) for record in records
    )
    return all(any(bound is not None for bound in bounds) for bounds in guarantees)


def _epsilon_has_no_effect(run: Run, made: str, reached: float) -> Finding:
    """GRPO and RLOO with one optimizer step for each generation batch, TRL's default."""
    kl = column(run.records, "trust.kl")
    limit = float(np.nanmedian(kl)) / 2 if np.isfinite(kl).any() else 0.02
    return Finding(
        "clip_never_binds",
        "epsilon has no effect: the ratio is 1 by construction",
        f"In {made}, one optimizer step was made for each batch of completions, TRL's default. The policy that is trained is "
        "still the one that sampled, so every ratio is 1 when the loss is computed, and nothing limits the step."
        + (f" Measured after the step, the largest ratio was {number(reached)}." if np.isfinite(reached) else ""),
        f"{set_limit(run, limit)}, in nats per token, which limits each step; or set num_iterations=2.",
    )


def _still_rising(kl: Column) -> bool:
    """Whether the last third of a run is clearly above the third before it, so that the KL may still reach its target."""
    third = max(1, len(kl) // 3)
    return mean(kl[-third:]) > 1.1 * mean(kl[-2 * third : -third])


def coefficient_pinned(run: Run) -> Finding | None:
    late = last_third(run.records)
    coef, (kl, target, unit) = column(late, "anchor.coef"), to_reference(late)
    if len(late) < FEW or not np.isfinite(target).all() or np.ptp(coef) != 0:
        return None
    below, above = (kl < target / BAND).all(), (kl > target * BAND).all()
    if not (below or above):
        return None
    side, bound, end = ("below", "min_coef", "floor") if below else ("above", "max_coef", "ceiling")
    if below and (coef[0] == 0 or _still_rising(to_reference(run.records).kl)):
        return None
    value = number(coef[0] / 10 if below else 10 * coef[0] or 0.05, 2)
    fixed = np.ptp(column(run.records, "anchor.coef")) == 0
    return Finding(
        "coefficient_pinned",
        f"The anchor's coefficient is constant while the KL is {side} its target",
        f"β was {number(coef[0])} in each of the last {count(len(late), 'update')}, although the KL to the reference was "
        f"{number(mean(kl))} {unit} and its target {number(target[-1])}. A controller changes β unless it is "
        f"held at its {end}" + (", or fixed." if fixed else "."),
        f"Give the controller {bound}={value}."
        if is_from_trl(run.records)
        else f'Set kl_controller_kwargs={{"{bound}": {value}}}'
        + (', with kl_controller="adaptive" if it is "fixed".' if fixed else "."),
    )


def target_never_reached(run: Run) -> Finding | None:
    kl, target, unit = to_reference(run.records)
    late, aim = last_third(kl), last_third(target)
    if len(run.records) < SOME or not np.isfinite(aim).all() or not np.isfinite(late).any():
        return None
    below = bool(np.nanmax(kl / target) < 1 - NEAR)
    above = bool(np.nanmin(late / aim) > 1 + NEAR)
    if not (below or above):
        return None
    coef, from_trl = float(column(run.records, "anchor.coef")[-1]), is_from_trl(run.records)
    if below:
        came = f"reached at most {number(largest(kl))} in the entire run"
    else:
        came = f"was at least {number(float(np.nanmin(late)))} in the last {count(len(late), 'update')}"
    if below and _still_rising(kl):
        longer = (
            f"max_steps={2 * run.records[-1].update}" if from_trl else f"total_episodes={2 * run.records[-1].episode}"
        )
        advice = f"Set {longer}, twice as many: the KL is still rising."
    else:
        field = "beta" if of_groups(run.records) else "the controller's coef" if from_trl else "kl_coef"
        advice = f"Set {field}={number(coef / 2 if below else 2 * coef or 0.05, 2)}, {'half' if below else 'twice'} the last β."
    return Finding(
        "target_never_reached",
        "The KL to the reference never reached its target" if below else "The KL to the reference is above its target",
        f"The target was {number(aim[-1])} {unit}; the KL {came}. The last β was {number(coef)}.",
        advice,
    )


def negative_estimate(run: Run) -> Finding | None:
    kl, exact = column(run.records, "anchor.kl"), column(run.records, "anchor.kl_exact")
    negative = kl < 0
    if negative.sum() < 2 or negative.mean() < NEGATIVE_SHARE:
        return None
    sampler = column(run.records, "sampler.kl")
    mismatch = largest(sampler) > MISMATCH
    evidence = (
        f"The estimate of the KL to the reference was negative in {of_updates(negative)}, with a minimum of "
        f"{number(float(np.nanmin(kl)))} nats per response"
    )
    from_trl = is_from_trl(run.records)
    known = np.isfinite(exact[negative]).any()
    evidence += f"; the exact KL averaged {number(mean(exact[negative]))} in these updates. " if known else ". "
    if from_trl:
        why = "A KL cannot be negative: near 0, an estimate from few responses is mostly noise."
        advice = "Set gradient_accumulation_steps to twice its value: more responses reduce the noise."
    elif mismatch:
        why = (
            f"The sampler and the training pass differ by {number(mean(sampler))} nats per token on average and by "
            f"{number(largest(sampler))} at most (sampler/kl)."
        )
        advice = (
            "Set generation_kwargs=None and bf16=False, so that tokens are sampled from the policy that is trained."
        )
    elif np.isfinite(sampler).any():
        why = f"The sampler agrees with the training pass (sampler/kl {number(mean(sampler))}): this is noise from few samples."
        advice = 'Set kl_estimator="exact" and kl_placement="both": the same gradient, computed from exact divergences.'
    else:
        why = "How much the sampler and the training pass differ is not on record."
        advice = 'Set kl_estimator="exact" and kl_placement="both", which cannot be negative whatever the sampler.'
    return Finding("negative_estimate", "The estimate of the KL is negative", evidence + why, advice)


def ratio_far_outside(run: Run) -> Finding | None:
    clipped = [record for record in run.records if token_range(record.trust) is not None]
    if not clipped:
        return None
    low, high = np.array([token_range(record.trust) for record in clipped], dtype=np.float64).T
    top, bottom = column(clipped, "trust.max_ratio"), quantile(clipped, "0.01")
    far = (top > FAR * high) | (bottom < low / FAR)
    if not far.any() or (of_groups(run.records) and (column(clipped, "trust.gated") <= IDLE).all()):
        return None  # a clip that cannot act has its own finding
    kl, trust = column(clipped, "trust.kl"), clipped[-1].trust
    limited = any(limit is not None for limit in (trust.limit, trust.limit_token, trust.limit_response))
    return Finding(
        "ratio_far_outside",
        "Ratios far outside the clip range, although clipping is on",
        f"In {of_updates(far)}, ratios ended outside the range [{number(low[-1], 2)}, {number(high[-1], 2)}] by more than a "
        f"factor of {FAR:g}: the largest ratio was {number(largest(top))}, and the lowest 1 % quantile was "
        f"{number(-largest(-bottom))}. Clipping removes the gradient of a token, but the gradients of other tokens still "
        "change its ratio.",
        f"{set_limit(run, float(np.nanmedian(kl)) / 2)} (nats per token), half of the median KL of an update"
        + (": the limit in force leaves room for such ratios." if limited else ": this limit is enforced."),
    )


def anchor_outweighs(run: Run) -> Finding | None:
    share = column(run.records, "anchor.share")
    over = share > 0.5
    if len(share) < FEW or over.sum() <= np.isfinite(share).sum() / 2:
        return None
    return Finding(
        "anchor_outweighs",
        "The penalty outweighs the reward",
        f"The anchor made up more than half of the advantage in {of_updates(over)}, {percent(mean(share))} on average: "
        "staying near the reference outweighs learning the task.",
        weaker_anchor(run),
    )


def early_stop(run: Run) -> Finding | None:
    stopped = np.array([record.trust.stopped for record in run.records])
    if len(stopped) < FEW or stopped.mean() <= 0.5:
        return None
    made, left_out = column(run.records, "trust.epochs")[stopped], stop_share(run.records)[stopped]
    return Finding(
        "early_stop",
        "Most updates are stopped early",
        f"{of_updates(stopped)} ended at trust_stop, after {number(mean(made))} epochs on average; at least "
        f"{percent(mean(left_out))} of their steps were skipped.",
        set_lr(run, 1 / 2, "half of the present one") + ", so that the planned epochs fit within the limit.",
    )


def learning_rate_floor(run: Run) -> Finding | None:
    if is_from_trl(run.records) and not of_groups(run.records):  # it does not adapt the learning rate to the KL
        return None
    lr, top = column(run.records, "lr"), configured_lr(run)
    floor = (lr > 0) & (lr <= 1.05 * LR_FLOOR * top)
    if floor.sum() < FEW or floor.mean() < FLOOR_SHARE:
        return None
    return Finding(
        "learning_rate_floor",
        "The learning rate is at its floor",
        f"In {of_updates(floor)} the learning rate was at most 1/32 of the largest one, "
        f"{number(top)}, which is the lowest that trust_lr_target allows. Those updates still moved the policy by "
        f"{number(mean(column(run.records, 'trust.kl')[floor]))} nats per token.",
        f"Set learning_rate={number(top / 8, 2)}, an eighth of the present one, so that the adaptation has room.",
    )


def reward_hacking(run: Run) -> Finding | None:
    _, likelihood = reference_per_token(run)
    score = column(run.records, "score")
    if len(likelihood) < SOME or len(score) < SOME:
        return None
    gained = mean(last_third(score)) - mean(first_third(score))
    noise = math.hypot(stderr(first_third(score)), stderr(last_third(score)))
    before, after = mean(first_third(likelihood)), mean(last_third(likelihood))
    if not (gained > 2 * noise and before - after > COLLAPSE):
        return None
    kl = mean(last_third(distance(run.records)))
    return Finding(
        "reward_hacking",
        "The score rises while the completions become unlikely under the reference",
        f"From the first third of the run to the last, the score rose by {number(gained)} (standard error "
        f"{number(noise, 2)}), and the reference's log-likelihood of the completions fell from {number(before)} to "
        f"{number(after)} nats per token. This is a sign of a policy that satisfies the reward but not the task: read the "
        "completions.",
        f'Set kl_controller="adaptive" and kl_target={number(kl / 3, 2)}, a third of the KL at the end '
        f"({number(kl)} nats per response).",
    )


def value_explains_nothing(run: Run) -> Finding | None:
    explained = last_third(column(run.records, "value.explained_variance"))
    if len(run.records) < SOME or not np.isfinite(explained).any() or np.nanmedian(explained) >= NOTHING:
        return None
    return Finding(
        "value_explains_nothing",
        "The value function explains nothing",
        f"Over the last {count(len(explained), 'update')} it explained {number(float(np.nanmedian(explained)))} of the "
        "variance of the returns (median; 1 is all of it, 0 is what a constant explains): the advantages are as noisy as "
        "without it.",
        set_lr(run, 5, "five times the policy's", "value_learning_rate") + ".",
    )


_GRADIENTS = {
    "biased": "is not that of the KL (or other divergence) it estimates",
    "partial": "has only one of the two terms it needs, the present cost and the future cost",
    "zero": "is 0 on average: it adds only noise",
}


def biased_estimator(run: Run) -> Finding | None:
    last = run.records[-1].anchor
    if last.gradient not in _GRADIENTS or not (column(run.records, "anchor.coef") > 0).any():
        return None
    return Finding(
        "biased_estimator",
        f"The anchor's gradient is {last.gradient}",
        f"The estimator {shortened(last.estimator, 40)} with the placement {shortened(last.placement, 40)} gives a "
        f"gradient that {_GRADIENTS[last.gradient]}.",
        _better_estimator(last.placement, last.gradient)
        if is_from_trl(run.records)
        else 'Set kl_estimator="k1" with kl_placement="reward"; "exact" with "both" has the least variance.',
    )


def _better_estimator(placement: str, gradient: str) -> str:
    """For TRL's trainers: GRPO has its anchor in the loss, PPO in the reward."""
    if placement == "reward":
        return 'Set kl_estimator="k1".'
    if gradient == "biased":
        return "Set use_bias_correction_kl=True, which only leaves out the future cost."
    return "Use RLOOTrainer: its k1 in the reward has both terms."


def updates_refused(run: Run) -> Finding | None:
    reasons = Counter(record.refused for record in run.records if record.refused is not None)
    if not reasons:
        return None
    reason, times = reasons.most_common(1)[0]
    total = reasons.total()
    return Finding(
        "updates_refused",
        "Updates were rejected",
        f"{total:,} of {count(len(run.records), 'update')} {'was' if total == 1 else 'were'} rejected, and the parameters "
        f"were left unchanged. The most frequent reason ({count(times, 'time')}): {shortened(reason, 200)}.",
        set_lr(run, 1 / 2, "half of the present one") + "; if the first update was rejected, set bf16=False.",
    )


FINDINGS: dict[str, Callable[[Run], Finding | None]] = {
    "updates_refused": updates_refused,
    "sampler_differs": sampler_differs,
    "reward_hacking": reward_hacking,
    "biased_estimator": biased_estimator,
    "weights_truncated": weights_truncated,
    "negative_estimate": negative_estimate,
    "target_never_reached": target_never_reached,
    "coefficient_pinned": coefficient_pinned,
    "anchor_blocks": anchor_blocks,
    "anchor_outweighs": anchor_outweighs,
    "anchor_pulls_more_than_reward": anchor_pulls_more_than_reward,
    "clip_never_binds": clip_never_binds,
    "ratio_far_outside": ratio_far_outside,
    "masks_leave_out_most": masks_leave_out_most,
    "masks_act_too_late": masks_act_too_late,
    "updates_go_further": updates_go_further,
    "clip_halves_updates": clip_halves_updates,
    "early_stop": early_stop,
    "limit_decides": limit_decides,
    "learning_rate_floor": learning_rate_floor,
    "value_explains_nothing": value_explains_nothing,
    "grad_norm_without_effect": grad_norm_without_effect,
}
"""Every finding by name, in the order of a report: from those that spoil a run to those that only slow it down."""


def find(run: Run) -> list[Finding]:
    return [finding for of_run in FINDINGS.values() if (finding := of_run(run)) is not None]
