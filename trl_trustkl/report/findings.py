"""Diagnoses: what in a run's records calls for a change of configuration, with the evidence and the change.

A finding is a function from a run to a `Finding`, or to None where the records do not show it. Each is decided by the
records alone, and says nothing of a run that is too short to tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .schema import Run
from .series import (
    Column,
    column,
    distance,
    first_third,
    is_from_trl_logs,
    largest,
    last_third,
    mean,
    quantile,
    reference_per_token,
    stderr,
    stop_share,
    token_range,
)
from .text import count, number, percent, shortened

FEW = 3  # updates without which a finding that holds for every one of them says nothing
SOME = 6  # updates without which thirds of a run cannot be compared
IDLE = 1e-6  # a gated share below this is none
NEAR = 0.25  # a KL this near to its target, relative to it, is at the target
BAND = 1.5  # inside [target / BAND, target · BAND] a controller may leave its coefficient alone
FAR = 2.0  # a ratio this many times outside the clip range is far outside
NEGATIVE_SHARE = 0.1  # of the updates; chance alone makes fewer estimates negative once the policy has moved
MISMATCH = 0.005  # nats per token between sampler and training pass; rounding stays below
LR_FLOOR = 1 / 32  # the least that the learning rate by KL leaves of the scheduled one
FLOOR_SHARE = 0.2  # of the updates; a schedule that decays to zero spends less than this below the floor
COLLAPSE = 0.5  # nats per token; text less likely by this, each token of it, is another kind of text
NOTHING = 0.05  # share of the returns' variance; less explained is as good as nothing


class Finding(NamedTuple):
    """A diagnosis: what is the case, the numbers that show it, and one concrete change of the configuration."""

    name: str
    title: str
    evidence: str
    advice: str


def configured_lr(run: Run) -> float:
    """The largest learning rate on record: `learning_rate` under a schedule that only decays it, whatever its warm-up.

    A run that ended within its warm-up never reached it, and `trust_lr_target` may have raised it.
    """
    return largest(column(run.records, "lr"))


def _present_lr(run: Run) -> str:
    """What the configured one is, in words; the records do not say whether `trust_lr_target` has raised it."""
    return ("" if is_from_trl_logs(run.records) else "at most ") + number(configured_lr(run))


def clip_never_binds(run: Run) -> Finding | None:
    clipped = [record for record in run.records if record.trust.rule != "none" and record.refused is None]
    if len(clipped) < FEW or not (column(clipped, "trust.gated") <= IDLE).all():  # NaN is not 0
        return None
    reached = largest(column(clipped, "trust.max_ratio"))
    made, stock = count(len(clipped), "update"), is_from_trl_logs(run.records)
    if all(record.trust.epochs <= 1 for record in clipped):
        return Finding(
            "clip_never_binds",
            "Clipping is on, and cannot act",
            f"The clip removed nothing in any of {made}, each of them a single pass over its batch. In one pass with one "
            "mini-batch the policy is still the one that sampled when the clip looks at it: every ratio is 1."
            + (f" Measured after the step, the largest was {number(reached)}." if np.isfinite(reached) else ""),
            "Set num_iterations=2, or for PPO num_ppo_epochs=2."
            if stock
            else "Set num_ppo_epochs=2 (or num_mini_batches=2); to bound a single step, set trust_max_kl instead.",
        )
    return Finding(
        "clip_never_binds",
        "Clipping is on, and never acted",
        f"The clip removed nothing in any of {made}"
        + (f"; the largest ratio measured after a step was {number(reached)}" if np.isfinite(reached) else "")
        + ". The updates are too small for the clip range to matter.",
        f"Set learning_rate={number(2 * configured_lr(run), 2)}, twice the present one, which is {_present_lr(run)}.",
    )


def _still_rising(kl: Column) -> bool:
    """Whether the last third of a run is clearly above the one before: what is below its target may yet reach it."""
    third = max(1, len(kl) // 3)
    return mean(kl[-third:]) > 1.1 * mean(kl[-2 * third : -third])


def coefficient_pinned(run: Run) -> Finding | None:
    late = last_third(run.records)
    coef, kl, target = column(late, "anchor.coef"), distance(late), column(late, "anchor.target")
    if len(late) < FEW or not np.isfinite(target).all() or np.ptp(coef) != 0:
        return None
    below, above = bool((kl < target / BAND).all()), bool((kl > target * BAND).all())
    if not (below or above):
        return None
    side, bound, value = ("below", "min_coef", coef[0] / 10) if below else ("above", "max_coef", 10 * coef[0])
    if below and (coef[0] == 0 or _still_rising(distance(run.records))):
        return None
    start = 10 * coef[0] if coef[0] > 0 else 0.05
    fixed = np.ptp(column(run.records, "anchor.coef")) == 0
    return Finding(
        "coefficient_pinned",
        f"The anchor's coefficient stands still while the KL is {side} its target",
        f"β was {number(coef[0])} in each of the last {count(len(late), 'update')}, with a KL to the reference of "
        f"{number(mean(kl))} nats per response against a target of {number(target[-1])}. A controller moves it unless it "
        f"is held at its {'floor' if below else 'ceiling'}" + (", or fixed." if fixed else "."),
        f"Give the controller {bound}={number(value if coef[0] > 0 else start, 2)}."
        if is_from_trl_logs(run.records)
        else f'Set kl_controller_kwargs={{"{bound}": {number(value if coef[0] > 0 else start, 2)}}}'
        + (', with kl_controller="adaptive" if it is "fixed".' if fixed else "."),
    )


def target_never_reached(run: Run) -> Finding | None:
    kl, target = distance(run.records), column(run.records, "anchor.target")
    late, aim = last_third(kl), last_third(target)
    if len(run.records) < SOME or not np.isfinite(aim).all() or not np.isfinite(late).any():
        return None
    below = bool(np.nanmax(kl / target) < 1 - NEAR)
    above = bool(np.nanmin(late / aim) > 1 + NEAR)
    if not (below or above):
        return None
    coef, stock = float(column(run.records, "anchor.coef")[-1]), is_from_trl_logs(run.records)
    when = "in the whole run" if below else f"in the last {count(len(late), 'update')}"
    came = f"came no nearer than {number(largest(kl))}" if below else f"stayed above {number(float(np.nanmin(late)))}"
    if below and _still_rising(kl):
        longer = f"max_steps={2 * run.records[-1].update}" if stock else f"total_episodes={2 * run.records[-1].episode}"
        advice = f"Set {longer}, twice as many: the KL is still rising."
    else:
        field = "the controller's coef" if stock else "kl_coef"
        advice = f"Set {field}={number(coef / 2 if below else 2 * coef or 0.05, 2)}, {'half' if below else 'twice'} the last β."
    return Finding(
        "target_never_reached",
        "The KL to the reference never reached its target" if below else "The KL to the reference is above its target",
        f"The target was {number(aim[-1])} nats per response; the KL {came} {when}, with β at {number(coef)} last.",
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
        f"The estimate of the KL to the reference was negative in {int(negative.sum()):,} of "
        f"{count(len(kl), 'update')}, at its lowest {number(float(np.nanmin(kl)))} nats per response"
    )
    stock = is_from_trl_logs(run.records)
    evidence += ". " if stock else f", where the exact KL averaged {number(mean(exact[negative]))}. "
    if stock:
        why = "A KL never is: near 0, an estimate from few responses is mostly noise."
        advice = "Set gradient_accumulation_steps to twice what it is: more responses, less noise."
    elif mismatch:
        why = (
            f"The sampler and the training pass disagree: by {number(mean(sampler))} nats per token on average, "
            f"{number(largest(sampler))} at most (sampler/kl)."
        )
        advice = "Set generation_kwargs=None and bf16=False, so that tokens are drawn from the policy that is trained."
    elif np.isfinite(sampler).any():
        why = f"The sampler agrees with the training pass (sampler/kl {number(mean(sampler))}): this is few samples' noise."
        advice = 'Set kl_estimator="exact" and kl_placement="both": the same gradient, from exact divergences.'
    else:
        why = "How far the sampler and the training pass disagree is not on record."
        advice = 'Set kl_estimator="exact" and kl_placement="both", which no sampler can make negative.'
    return Finding("negative_estimate", "The estimate of the KL is negative", evidence + why, advice)


def ratio_far_outside(run: Run) -> Finding | None:
    clipped = [record for record in run.records if token_range(record.trust) is not None]
    if not clipped:
        return None
    low, high = np.array([token_range(record.trust) for record in clipped], dtype=np.float64).T
    top, bottom = column(clipped, "trust.max_ratio"), quantile(clipped, "0.01")
    far = (top > FAR * high) | (bottom < low / FAR)
    if not far.any():
        return None
    kl = column(clipped, "trust.kl")
    limited = clipped[-1].trust.limit is not None
    return Finding(
        "ratio_far_outside",
        "Ratios far outside the clip range, although clipping is on",
        f"In {int(far.sum()):,} of {count(len(clipped), 'update')} some token's probability ended more than {FAR:g} times "
        f"outside the range [{number(low[-1], 2)}, {number(high[-1], 2)}]: the largest ratio was {number(largest(top))}, "
        f"and the lowest of the ratios' 1 % quantiles {number(-largest(-bottom))}. Clipping stops a token's gradient; it "
        "does not stop other tokens' gradients from moving it.",
        f"Set trust_max_kl={number(float(np.nanmedian(kl)) / 2, 2)} (nats per token), half of what an update moved"
        + (": the limit in force leaves room for such ratios." if limited else ": that is a limit that holds."),
    )


def anchor_outweighs(run: Run) -> Finding | None:
    share = column(run.records, "anchor.share")
    over = share > 0.5
    if len(share) < FEW or over.sum() <= np.isfinite(share).sum() / 2:
        return None
    coef, target = float(np.nanmedian(column(run.records, "anchor.coef"))), run.records[-1].anchor.target
    return Finding(
        "anchor_outweighs",
        "The penalty outweighs the reward",
        f"The anchor made up more than half of the advantage in {int(over.sum()):,} of {count(len(share), 'update')}, "
        f"{percent(mean(share))} on average: the policy learns to stay more than it learns the task.",
        f"Set kl_coef={number(coef / 2, 2)}, half of the present β in the median."
        if target is None
        else f"Set kl_target={number(1.5 * target, 2)}, half as much again, so that the controller settles at a lower β.",
    )


def early_stop(run: Run) -> Finding | None:
    stopped = np.array([record.trust.stopped for record in run.records])
    if len(stopped) < FEW or stopped.mean() <= 0.5:
        return None
    made, left_out = column(run.records, "trust.epochs")[stopped], stop_share(run.records)[stopped]
    return Finding(
        "early_stop",
        "Most updates are stopped early",
        f"{int(stopped.sum()):,} of {count(len(stopped), 'update')} ended at trust_stop, after {number(mean(made))} epochs on "
        f"average; at least {percent(mean(left_out))} of their steps were left out.",
        f"Set learning_rate={number(configured_lr(run) / 2, 2)}, half of the present one, which is {_present_lr(run)}: the "
        "planned epochs have to fit within the limit.",
    )


def learning_rate_floor(run: Run) -> Finding | None:
    if is_from_trl_logs(run.records):  # no trainer of TRL's own adapts the learning rate to the KL
        return None
    lr, top = column(run.records, "lr"), configured_lr(run)
    floor = (lr > 0) & (lr <= 1.05 * LR_FLOOR * top)
    if floor.sum() < FEW or floor.mean() < FLOOR_SHARE:
        return None
    return Finding(
        "learning_rate_floor",
        "The learning rate is at its floor",
        f"In {int(floor.sum()):,} of {count(len(lr), 'update')} the learning rate was at most 1/32 of the largest, "
        f"{number(top)}: as low as the adaptation to trust_lr_target goes. Those updates moved the policy by "
        f"{number(mean(column(run.records, 'trust.kl')[floor]))} nats per token all the same.",
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
        "The score rises while the text becomes one the reference would not write",
        f"From the first third of the run to the last the score rose by {number(gained)} (standard error "
        f"{number(noise, 2)}), and the reference's likelihood of the completions fell from {number(before)} to "
        f"{number(after)} nats per token: the sign of a policy that satisfies the reward and not the task. Read the "
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
        "returns' variance in the median (1 would be all, 0 is what a constant explains): advantages are as noisy as "
        "without it.",
        f"Set value_learning_rate={number(5 * configured_lr(run), 2)}, five times the policy's, which is {_present_lr(run)}.",
    )


_GRADIENTS = {
    "biased": "is that of another quantity than the KL (or divergence) it estimates",
    "partial": "has one of two terms that are both needed: the present cost or the future one",
    "zero": "is 0 on average: it adds noise and no pull",
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
        if is_from_trl_logs(run.records)
        else 'Set kl_estimator="k1" with kl_placement="reward"; "exact" with "both" has the least variance.',
    )


def _better_estimator(placement: str, gradient: str) -> str:
    """For TRL's own trainers: GRPO has its anchor in the loss, PPO in the reward."""
    if placement == "reward":
        return 'Set kl_estimator="k1".'
    if gradient == "biased":
        return "Set use_bias_correction_kl=True, which leaves out the future cost only."
    return "Use RLOOTrainer: its k1 in the reward has both terms."


def updates_refused(run: Run) -> Finding | None:
    reasons = Counter(record.refused for record in run.records if record.refused is not None)
    if not reasons:
        return None
    reason, times = reasons.most_common(1)[0]
    return Finding(
        "updates_refused",
        "Updates were refused",
        f"{count(reasons.total(), 'update')} of {len(run.records):,} left the parameters as they were; the reason given "
        f"most often ({count(times, 'time')}): {shortened(reason, 200)}.",
        f"Set learning_rate={number(configured_lr(run) / 2, 2)}, half of the present one, which is {_present_lr(run)}; where "
        "it is the first update, set bf16=False.",
    )


FINDINGS: dict[str, Callable[[Run], Finding | None]] = {
    "updates_refused": updates_refused,
    "reward_hacking": reward_hacking,
    "biased_estimator": biased_estimator,
    "negative_estimate": negative_estimate,
    "target_never_reached": target_never_reached,
    "coefficient_pinned": coefficient_pinned,
    "anchor_outweighs": anchor_outweighs,
    "clip_never_binds": clip_never_binds,
    "ratio_far_outside": ratio_far_outside,
    "early_stop": early_stop,
    "learning_rate_floor": learning_rate_floor,
    "value_explains_nothing": value_explains_nothing,
}
"""Every finding by its name, in the order of a report: what spoils a run first, what merely slows it last."""


def find(run: Run) -> list[Finding]:
    """The findings that the run's records show."""
    found = (of_run(run) for of_run in FINDINGS.values())
    return [finding for finding in found if finding is not None]
