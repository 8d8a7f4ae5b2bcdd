"""The answer in words: what bounded a run's updates, in sentences drawn by rule from its records."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from ..records import BoundRecord
from .schema import Run
from .series import Column, column, distance, first_third, largest, last_third, mean, stderr, token_range
from .text import count, number, percent, shortened

MECHANISMS = {
    "anchor": "the anchor",
    "clip": "the clip",
    "penalty": "the penalty on KL(π_old‖π)",
    "stop": "the early stop",
    "backtrack": "backtracking",
    "grad_norm": "the limit on the gradient's norm",
    "lr": "the learning rate by KL",
    "none": "nothing (no mechanism took 1 %)",
    "refused": "none, as the update was refused,",
    "unknown": "not on record",
}


class Statement(NamedTuple):
    """A topic, and what is to be said of it."""

    topic: str
    text: str


def summarise(run: Run) -> list[Statement]:
    """What happened, which mechanism bound it, where the anchor stood, the largest update, what is guaranteed."""
    return [
        Statement("Outcome", outcome(run)),
        Statement("What bound the updates", binding(run)),
        Statement("The anchor", anchor(run)),
        Statement("The largest update", largest_update(run)),
        Statement("Guaranteed", guaranteed(run)),
        Statement("Not guaranteed", not_guaranteed(run)),
    ]


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
        text += f" {count(refused, 'update')} {'was' if refused == 1 else 'were'} refused: the parameters stayed as they were."
    return text


def binding(run: Run) -> str:
    """Which mechanism took the largest share of how many updates."""
    most = Counter("refused" if r.refused is not None else r.binding for r in run.records).most_common()
    parts = [f"{MECHANISMS.get(name, shortened(name, 40))} in {times:,}" for name, times in most]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    text = f"Of {count(len(run.records), 'update')}, the mechanism that took the largest share was {listed}."
    anchored = (column(run.records, "anchor.coef") > 0).any()
    if anchored and not np.isfinite(column(run.records, "anchor.share")).any():
        text += " The anchor is not among them: its share is not on record."
    return text


def anchor(run: Run) -> str:
    """Where the KL to the reference stood, against its target where there is one."""
    late = last_third(run.records)
    kl, target = distance(late), column(late, "anchor.target")
    over = f"over the last {count(len(late), 'update')}" if len(late) > 1 else "in the last update"
    stood = f"{number(mean(kl))} nats per response {over}"
    if not np.isfinite(column(late, "anchor.kl_exact")).any():
        stood += f" (an estimate, by {shortened(late[-1].anchor.estimator, 40)})"
    coefs = column(run.records, "anchor.coef")
    if not np.isfinite(kl).any():
        return f"The KL to the reference is not on record{'; β was 0 throughout' if (coefs == 0).all() else ''}."
    if (coefs == 0).all():
        return f"None: β was 0 throughout, and the KL to the reference went where the reward took it: {stood}."
    first, last = number(coefs[0]), number(coefs[-1])
    beta = f"β went from {first} to {last}" if first != last else f"β began and ended at {first}"
    beta = f"β stood at {first}" if np.ptp(coefs) == 0 else beta
    share = mean(column(run.records, "anchor.share"))
    weight = f", and made up {percent(share)} of the advantage on average" if np.isfinite(share) else ""
    if not np.isfinite(target[-1]):
        return f"The KL to the reference averaged {stood}, without a target; {beta}{weight}."
    return (
        f"The KL to the reference averaged {stood}; the target is {number(target[-1])} ({_against(kl, target)}). {beta}"
        f"{weight}. The anchor is a soft pull: it decides where the run ends, and bounds no update."
    )


def _against(kl: Column, target: Column) -> str:
    relative = mean(kl / target)
    side = "at it" if abs(relative - 1) <= 0.1 else "below it" if relative < 1 else "above it"
    return f"{side}: {percent(relative)} of it"


def largest_update(run: Run) -> str:
    """The single update that moved the policy most, and what it would have been without enforcement."""
    kl = column(run.records, "trust.kl")
    if not np.isfinite(kl).any():
        return "No update was measured."
    record = run.records[int(np.nanargmax(kl))]
    trust = record.trust
    text = (
        f"Update {record.update:,} moved the policy most: measured after it, KL(π_old‖π) was {number(trust.kl)} nats per "
        f"token on average over the batch, {number(trust.kl_max)} at the worst token. An update moved it by "
        f"{number(float(np.nanmedian(kl)))} in the median. The largest probability ratio of the run was "
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
    """What something enforced."""
    bounds = column(run.records, "trust.guaranteed")
    held = np.isfinite(bounds)
    if not held.any():
        measured = np.isfinite(column(run.records, "trust.kl")).any()
        scope = "The numbers above were measured after each update." if measured else "Nor was any update measured."
        return f"Nothing: no mechanism of this run enforces a bound. {scope}"
    which = "In every update" if held.all() else f"In {int(held.sum()):,} of {count(len(bounds), 'update')}"
    return (
        f"{which}, the mean KL(π_old‖π) over the tokens of the batch was at most {number(largest(bounds))} nats per token: "
        "backtracking enforced it, on the contexts that the batch visited."
    )


def not_guaranteed(run: Run) -> str:
    """What the mechanisms of this run leave open."""
    bounded = np.isfinite(column(run.records, "trust.guaranteed")).any()
    last: BoundRecord = run.records[-1]
    open_ends = ["the KL to the reference" + (" (β pulls, and bounds nothing)" if last.anchor.coef > 0 else "")]
    if bounded:
        open_ends.append(
            f"a single token (the worst moved by {number(largest(column(run.records, 'trust.kl_max')))} nats)"
        )
        open_ends.append("prompts that were not in the batch")
    else:
        open_ends.append("the size of an update")
    if last.trust.rule != "none":
        open_ends.append("the ratio (the clip removes gradients, it does not hold ratios in its range)")
    return "Nothing bounds " + ", ".join(open_ends[:-1]) + ", or " + open_ends[-1] + "."
