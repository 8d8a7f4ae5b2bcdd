"""The summary of a run in sentences, made by rule from its records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..bounds import BINDING_THRESHOLD
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
    if (coefs == 0).all():
        return f"None: β was 0 throughout, so nothing limited the KL to the reference. It {averaged}."
    first, last = number(coefs[0]), number(coefs[-1])
    beta = f"β went from {first} to {last}" if first != last else f"β began and ended at {first}"
    beta = f"β was constant at {first}" if np.ptp(coefs) == 0 else beta
    share = mean(column(run.records, "anchor.share"))
    weight = f", and the penalty made up {percent(share)} of the advantage on average" if np.isfinite(share) else ""
    if not np.isfinite(target[-1]):
        return f"The KL to the reference {averaged}, without a target; {beta}{weight}."
    relative = mean(kl / target)
    side = "close to" if abs(relative - 1) <= 0.1 else "below" if relative < 1 else "above"
    return (
        f"The KL to the reference {averaged}, {side} its target of {number(target[-1])} ({percent(relative)} of it); {beta}"
        f"{weight}. The anchor is a penalty: it determines where the run ends, but does not bound any update."
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
    shortened_by = int((column(standing, "trust.scale") < 1).sum())
    if shortened_by:
        text += (
            f". Backtracking shortened {count(shortened_by, 'update')}; without it the largest would have moved the policy "
            f"by {number(largest(proposed))}"
        )
    return text + "."


def guaranteed(run: Run) -> str:
    """The bound that was enforced, if any."""
    bounds = column(run.records, "trust.guaranteed")
    held = np.isfinite(bounds)
    if not held.any():
        measured = np.isfinite(column(run.records, "trust.kl")).any()
        scope = "The numbers above were measured after each update." if measured else "Nor was any update measured."
        return f"Nothing: no mechanism of this run enforces a bound. {scope}"
    which = "In every update" if held.all() else f"In {int(held.sum()):,} of {count(len(bounds), 'update')}"
    return (
        f"{which}, the mean KL(π_old‖π) over the tokens of the batch was at most {number(largest(bounds))} nats per token: "
        "backtracking enforced this bound, on the contexts of the batch."
    )


def not_guaranteed(run: Run) -> str:
    """What no mechanism of this run bounds."""
    last = run.records[-1]
    unbounded = ["the KL to the reference" + (" (the anchor is a penalty)" if last.anchor.coef > 0 else "")]
    if np.isfinite(column(run.records, "trust.guaranteed")).any():
        worst = number(largest(column(run.records, "trust.kl_max")))
        unbounded += [f"the KL at a single token (the largest was {worst} nats)", "prompts that were not in the batch"]
    else:
        unbounded.append("the size of an update")
    if last.trust.rule != "none":
        unbounded.append("the ratio (the clip removes gradients, but does not keep ratios in its range)")
    return f"Nothing bounds {listed(unbounded, 'or')}."


def certified(run: Run) -> str | None:
    """How many updates have a gain above the bound on its error, and how small the others would have had to be; None where no
    certificate is on record."""
    records = [record for record in run.records if record.trust.certificate is not None]
    if not records:
        return None
    difference, needed = column(records, "trust.certificate.difference"), column(records, "trust.certificate.kl_needed")
    far, lost = ~(difference > 0) & np.isfinite(needed), column(records, "trust.certificate.gain") <= 0
    on_record = "" if len(records) == len(run.records) else " with a certificate on record"
    text = (
        f"On their own batch, {int((difference > 0).sum()):,} of {count(len(records), 'update')}{on_record} are certified: the "
        "surrogate's gain is above the bound on its error"
    )
    if far.any():
        worst = float(np.nanmedian(column(records, "trust.kl_max")[far]))
        text += (
            f". For {int(far.sum()):,} others, the largest KL of one token would have had to be at most "
            f"{number(float(np.median(needed[far])))} nats (median) instead of {number(worst)}"
        )
    if lost.any():
        text += f". In {int(lost.sum()):,}, the gain was not above 0, so that no limit would have helped"
    return f"{text}. This is a statement about each batch, no proof."
