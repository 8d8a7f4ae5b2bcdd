"""The summary of a run in sentences, made by rule from its records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..bounds import BINDING_THRESHOLD
from ..certificate import is_certified
from ..records import BoundRecord
from .schema import Run
from .series import (
    Column,
    attributed,
    column,
    factors,
    first_third,
    geometric_mean,
    largest,
    last_third,
    mean,
    stderr,
    to_reference,
    token_range,
)
from .text import count, listed, number, percent, shortened

MECHANISMS = {
    "anchor": "the anchor",
    "clip": "the clip",
    "response_mask": "response masks",
    "penalty": "the penalty on KL(π_old‖π)",
    "stop": "the early stop",
    "backtrack": "backtracking",
    "grad_norm": "the limit on the gradient's norm",
    "lr": "the KL-adaptive learning rate",
    "value_clip": "the clip of the value",
    "none": "none (every share was below 1 %)",
    "refused": "none, because the update was rejected,",
    "unknown": "not on record",
}


BOUNDS = {
    "trust.guaranteed": "the mean KL(π_old‖π) over the tokens of the batch was at most {} nats per token",
    "trust.guaranteed_token": "the KL(π_old‖π) of each of its tokens was at most {} nats",
    "trust.guaranteed_response": "the sum of the KL(π_old‖π) over each of its responses was at most {} nats",
    "anchor.guaranteed": "the mean KL(π‖π_ref) of its responses was at most {} nats",
}
"""What backtracking may enforce, by its column."""
PENALTY = " The anchor is a penalty: it determines where the run ends, but does not bound any update."
SAME = 0.01  # a KL that differs by less, relative to the KL as it was, counts as the same


class Statement(NamedTuple):
    topic: str
    text: str


def summarise(run: Run) -> list[Statement]:
    statements = [
        Statement("Outcome", outcome(run)),
        Statement("What limited the updates", binding(run)),
        Statement("The anchor", anchor(run)),
        Statement("The largest update", largest_update(run)),
        Statement("Guaranteed", guaranteed(run)),
        Statement("Not guaranteed", not_guaranteed(run)),
    ]
    if (text := certified(run)) is not None:
        statements.append(Statement("Certified", text))
    return statements


def outcome(run: Run) -> str:
    records = run.records
    made = f"{count(len(records), 'update')}, {records[-1].episode:,} episodes"
    score = column(records, "score")
    if not np.isfinite(score).any():
        return f"{made}; no update has a score."
    start, end = first_third(score), last_third(score)
    if len(records) < 3:
        text = f"{made}; the score was {number(mean(score))}."
    else:
        noise = float(np.hypot(stderr(start), stderr(end)))
        moved = mean(end) - mean(start)
        verdict = "rose" if moved > 2 * noise else "fell" if moved < -2 * noise else "did not clearly change"
        text = (
            f"{made}. The mean score {verdict}: {number(mean(start))} over the first third of the run, "
            f"{number(mean(end))} over the last (standard error of the difference {number(noise, 2)})."
        )
    refused = sum(record.refused is not None for record in records)
    if refused:
        text += f" {count(refused, 'update')} {'was' if refused == 1 else 'were'} rejected; the parameters were left unchanged."
    return text


def binding(run: Run) -> str:
    """What the updates would have been without each mechanism, where that is on record; else which one intervened most."""
    changes, rerun = factors(run.records), attributed(run.records)
    if not any(np.isfinite(values).any() for values in changes.values()):
        return interventions(run.records)
    text = counterfactuals(changes, len(rerun))
    others = [record for record in run.records if record.counterfactual is None]
    if others:
        text += " Of the other updates, only interventions are on record, which need not have changed the outcome. "
        text += interventions(others)
    return text


def counterfactuals(changes: dict[str, Column], rerun: int) -> str:
    """By what factor the KL of an update would have been larger without each mechanism; the largest factor first."""
    groups: dict[str, list[str]] = {"changed": [], "same": [], "same on average": []}
    known = {name: values[np.isfinite(values)] for name, values in changes.items() if np.isfinite(values).any()}
    for name in sorted(known, key=lambda name: -geometric_mean(known[name])):
        factor = geometric_mean(known[name])
        if (abs(known[name] - 1) < SAME).all():
            groups["same"].append(MECHANISMS[name])
        elif abs(factor - 1) < SAME:
            groups["same on average"].append(MECHANISMS[name])
        else:
            groups["changed"].append(f"{number(factor)} times as large without {MECHANISMS[name]}")
    averaged = "" if rerun == 1 else " (geometric means)"
    would = "the KL(π_old‖π) of an update would have been" if rerun > 1 else "the KL(π_old‖π) would have been"
    parts = [f"{would} {listed(groups['changed'])}{averaged}"] if groups["changed"] else []
    for group, same in (("same", "the same"), ("same on average", "the same on average, but not in each update")):
        if groups[group]:
            subject = "it would have been" if parts else would
            parts.append(f"without {listed(groups[group], 'or')}, {subject} {same}")
    return f"In {count(rerun, 'attributed update')}, {'; '.join(parts)}."


def interventions(records: Sequence[BoundRecord]) -> str:
    """In how many updates each mechanism had the largest share."""
    most = Counter("refused" if r.refused is not None else r.binding for r in records).most_common()
    names = MECHANISMS
    if any(record.shares for record in records):
        names = names | {"unknown": "none of those on record (every share was below 1 %)"}
    (first, times), *others = [(names.get(name, shortened(name, 40)), times) for name, times in most]
    parts = [
        f"{first} in {times:,} of {count(len(records), 'update')}",
        *(f"{name} in {n:,}" for name, n in others),
    ]
    text = f"The mechanism that intervened most was {listed(parts)}."
    anchored = (column(records, "anchor.coef") > 0).any()
    if anchored and not np.isfinite(column(records, "anchor.share")).any():
        text += " The anchor is not among them: its share is not on record."
    if any(_norm_left_out(record) for record in records):
        text += " The limit on the gradient's norm is not among them: the optimizer rescales gradients itself."
    return text


def _norm_left_out(record: BoundRecord) -> bool:
    """Whether the limit on the gradient's norm has the largest share, but `binding` names another mechanism or none."""
    if record.shares is None or record.refused is not None or record.counterfactual is not None:
        return False
    bound = record.shares.get(record.binding, BINDING_THRESHOLD if record.binding == "none" else math.inf)
    return record.shares.get("grad_norm", 0.0) > bound


def anchor(run: Run) -> str:
    """The KL to the reference at the end, its target if there is one, and the coefficient."""
    late = last_third(run.records)
    kl, target, unit = to_reference(late)
    over = f"over the last {count(len(late), 'update')}" if len(late) > 1 else "in the last update"
    averaged = f"averaged {number(mean(kl))} {unit} {over}"
    if not np.isfinite(column(late, "anchor.kl_exact")).any():
        averaged += f" (an estimate, by {shortened(late[-1].anchor.estimator, 40)})"
    if renewals := sum(bool(record.anchor.renewed) for record in run.records):
        averaged += f" (to the reference as renewed, {count(renewals, 'time')} in the run)"
    coefs = column(run.records, "anchor.coef")
    if not np.isfinite(kl).any():
        return f"The KL to the reference is not on record{'; β was 0 throughout' if (coefs == 0).all() else ''}."
    limit = column(run.records, "anchor.limit")
    limited = f"A hard limit of {number(largest(limit))} nats per response was enforced on each batch."
    limited = f" {limited}" if np.isfinite(limit).any() else ""
    if (coefs == 0).all():
        nothing = "no penalty limited" if limited else "nothing limited"
        return f"None: β was 0 throughout, so {nothing} the KL to the reference. It {averaged}.{limited}"
    first, last = number(coefs[0]), number(coefs[-1])
    beta = f"β went from {first} to {last}" if first != last else f"β began and ended at {first}"
    beta = f"β was constant at {first}" if np.ptp(coefs) == 0 else beta
    share = mean(column(run.records, "anchor.share"))
    weight = f", and the penalty made up {percent(share)} of the advantage on average" if np.isfinite(share) else ""
    if not np.isfinite(target[-1]):
        return f"The KL to the reference {averaged}, without a target; {beta}{weight}.{limited}"
    relative = mean(kl / target)
    side = "close to" if abs(relative - 1) <= 0.1 else "below" if relative < 1 else "above"
    return (
        f"The KL to the reference {averaged}, {side} its target of {number(target[-1])} ({percent(relative)} of it); {beta}"
        f"{weight}.{limited or PENALTY}"
    )


def largest_update(run: Run) -> str:
    """The update that moved the policy most, and the largest one without enforcement."""
    kl = column(run.records, "trust.kl")
    if not np.isfinite(kl).any():
        return "No update was measured."
    record = run.records[int(np.nanargmax(kl))]
    trust = record.trust
    text = (
        f"Update {record.update:,} moved the policy most: measured after it, KL(π_old‖π) was {number(trust.kl)} nats per "
        f"token on average over the batch and {number(trust.kl_max)} at the worst token. The median over all updates was "
        f"{number(float(np.nanmedian(kl)))} nats per token. The largest probability ratio of the run was "
        f"{number(largest(column(run.records, 'trust.max_ratio')))}"
    )
    if (clip := token_range(trust)) is not None:
        text += f", with a clip range of [{number(clip[0], 2)}, {number(clip[1], 2)}]"
    standing = [record for record in run.records if record.refused is None]
    proposed = column(standing, "trust.kl_proposed")
    scale = column(standing, "trust.scale")
    if shortened_by := int((scale < 1).sum()):
        text += (
            f". Backtracking shortened {count(shortened_by, 'update')}; without it the largest would have moved the policy "
            f"by {number(largest(proposed))}"
        )
    decided = Counter(record.trust.decided for record in standing if record.trust.decided is not None).most_common()
    if len(decided) > 1 or (decided and decided[0][0] != "trust_max_kl"):
        named = [f"{shortened(name, 40)} in {count(n, 'update')}" for name, n in decided]
        text += f". The limit that decided was {listed(named)}"
        if blocked := int((scale == 0).sum()):
            text += f"; {count(blocked, 'update')} changed nothing"
    return text + "."


def guaranteed(run: Run) -> str:
    """The bound that was enforced, if any."""
    found: dict[str, list[str]] = {}
    for key, bound in BOUNDS.items():
        held = np.isfinite(values := column(run.records, key))
        if held.any():
            which = "in every update" if held.all() else f"in {int(held.sum()):,} of {count(len(held), 'update')}"
            found.setdefault(which, []).append(bound.format(number(largest(values))))
    if not found:
        measured = np.isfinite(column(run.records, "trust.kl")).any()
        scope = "The numbers above were measured after each update." if measured else "Nor was any update measured."
        return f"Nothing: no mechanism of this run enforces a bound. {scope}"
    several = "these bounds" if sum(map(len, found.values())) > 1 else "this bound"
    text = "; ".join(f"{which}, {listed(bounds)}" for which, bounds in found.items())
    text = text[0].upper() + text[1:]
    return f"{text}: backtracking enforced {several}, on the contexts of the batch.{_above_the_limit(run)}"


def _above_the_limit(run: Run) -> str:
    """The updates from above the limit of the anchor, whose bound is the KL before them."""
    limit, bound = column(run.records, "anchor.limit"), column(run.records, "anchor.guaranteed")
    above = int((bound > limit).sum())
    if not above:
        return ""
    made = "was" if above == 1 else "were"
    return (
        f" {count(above, 'update')} {made} made from above the limit of {number(largest(limit))} nats per response on the KL "
        "to the reference, and did not increase it."
    )


def not_guaranteed(run: Run) -> str:
    """What no mechanism of this run bounds."""
    last = run.records[-1]
    held = {key for key in BOUNDS if np.isfinite(column(run.records, key)).any()}
    unbounded = []
    if "anchor.guaranteed" not in held:
        unbounded.append("the KL to the reference" + (" (the anchor is a penalty)" if last.anchor.coef > 0 else ""))
    if not held - {"anchor.guaranteed"}:
        unbounded.append("the size of an update")
    elif held <= {"trust.guaranteed", "anchor.guaranteed"}:
        worst = number(largest(column(run.records, "trust.kl_max")))
        unbounded.append(f"the KL at a single token (the largest was {worst} nats)")
    if held:
        unbounded.append("prompts that were not in the batch")
    if last.trust.rule != "none":
        unbounded.append("the ratio (the clip removes gradients, but does not keep ratios in a range)")
    return f"Nothing bounds {listed(unbounded, 'or')}."


def certified(run: Run) -> str | None:
    """How many updates have a gain above the bound on its error, and how small the others would have had to be; None where no
    certificate is on record."""
    records = [record for record in run.records if record.trust.certificate is not None]
    if not records:
        return None
    certificates = [found for record in records if (found := record.trust.certificate) is not None]
    held = np.array([is_certified(found) for found in certificates])
    needed = column(records, "trust.certificate.kl_needed")
    far, lost = ~held & np.isfinite(needed), ~np.isfinite(needed)
    on_record = "" if len(records) == len(run.records) else " with a certificate on record"
    text = (
        f"On their own batch, {int(held.sum()):,} of {count(len(records), 'update')}{on_record} are certified: the surrogate's "
        "gain is above the bound on its error by two standard errors"
    )
    if far.any():
        worst = float(np.nanmedian(column(records, "trust.kl_max")[far]))
        text += (
            f". For {int(far.sum()):,} {'other' if far.sum() == 1 else 'others'}, the largest KL of one token would have had "
            f"to be at most {number(float(np.median(needed[far])))} nats (median) instead of {number(worst)}"
        )
    if lost.any():
        text += f". In {int(lost.sum()):,}, the gain was not above 0 by that much, so that no limit would have helped"
    return f"{text}. This is a statement about each batch, not a proof."
