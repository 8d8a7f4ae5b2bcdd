"""The captions of a report's figures: what each shows of these records, and how to read it.

A caption mentions a line, a band or a mechanism only if the records have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..records import BoundRecord
from .series import attributed, column, quantile, to_reference, token_range

Records = Sequence[BoundRecord]

POINTS = 300  # bins of a long line
BARS = 120  # bins of bars and of counterfactuals
DOTS = 1500  # dots of a scatter plot, at least where there are that many updates


def score(records: Records) -> str:
    return "The mean score of the responses of each update; higher is more reward." + lines_in_bins(records)


def frontier(records: Records) -> str:
    stride = stride_of(len(records))
    which = "an update" if stride == 1 else f"one of {stride} successive updates"
    return (
        f"Each dot is {which}: higher is a better score, and further right is farther from the reference. The grey line shows "
        "the path of the run; a path that turns down towards the right is a sign of over-optimisation."
    )


def anchor(records: Records) -> str:
    target, coef = to_reference(records).target, column(records, "anchor.coef")
    exact = np.isfinite(column(records, "anchor.kl_exact")).any()
    text = f"The KL to the reference{'' if exact else ', as estimated'} when each batch was sampled, before the update."
    if (coef == 0).all():
        text += " β was 0 throughout: no penalty acted on it."
    elif not (coef > 0).any():
        pass
    elif np.ptp(coef) == 0:
        text += " The coefficient β (lower panel) was the same in every update."
    elif np.isfinite(target).any():
        text += " A controller raises β (lower panel) to bring the KL down to the target, and lowers β to let it rise."
    else:
        text += " The lower panel is the coefficient β."
    return text + lines_in_bins(records)


def trust_region(records: Records) -> str:
    text = "The KL from the policy that sampled the batch to the updated policy."
    limited = {
        "The dashed red line is the limit that was enforced on its mean over the batch.": "trust.limit",
        "The dotted red line is the limit that was enforced on each token.": "trust.limit_token",
    }
    said = [sentence for sentence, key in limited.items() if np.isfinite(column(records, key)).any()]
    scale = column(records, "trust.scale")
    if not said and np.isfinite(scale).any():
        said.append("The limits that were enforced are on other quantities.")
    elif not said:
        said.append("No limit was enforced; the KL was only measured.")
    if (scale < 1).any():
        said.append("The orange line is the mean as it would have been without enforcement.")
    return " ".join([text, *said]) + lines_in_bins(records)


def gated(records: Records) -> str:
    return (
        "The taller a bar, the larger the share of the update in which the mechanism intervened, which need not be what it "
        "changed; shares overlap, so a stack can exceed 1, and a gap is an update in which no mechanism intervened or whose "
        f"shares are not on record.{in_bins('bar', 'mean', len(records), BARS)}"
    )


def counterfactual(records: Records) -> str:
    rerun = len(attributed(records))
    return (
        f"The updates that were rerun without each mechanism: {rerun:,} of {len(records):,}. Grey is the KL as it was: a "
        "colour above grey is a mechanism that limited the update, one below grey let it go further, and one on grey did not "
        f"change how far it went.{in_bins('point', 'mean', rerun, BARS)}"
    )


def ratios(records: Records) -> str:
    text = "The red line is the largest ratio of a sampled token after each update"
    if np.isfinite(quantile(records, "0.5")).any():
        text += ", and the blue bands hold 98 %, 90 % and 50 % of the ratios"
    text += "."
    if token_range(records[-1].trust) is not None:
        text += " The clip range is grey: the clip acts on gradients and does not keep the ratios inside the range."
    return text + lines_in_bins(records)


def gradient(records: Records) -> str:
    text = "The norm of the policy's gradient before it is limited, as a mean over the steps of an update."
    if (column(records, "gradient.max_norm") > 0).any():
        text += (
            " A gradient above the dashed line is scaled down to it; under an optimizer that rescales gradients itself, such "
            "as Adam, this hardly changes the update unless the gradient's norm varies from step to step."
        )
    else:
        text += " No limit was set on it."
    return text + lines_in_bins(records)


def stride_of(updates: int) -> int:
    """Every how many updates have a dot in a scatter plot."""
    return max(1, updates // DOTS)


def lines_in_bins(records: Records) -> str:
    """For lines as `figures.plot_line` draws them."""
    if len(records) <= 2 * POINTS:
        return ""
    return (
        f"{in_bins('point of a line', 'median', len(records), POINTS)} A band reaches from the smallest to the largest."
    )


def in_bins(what: str, statistic: str, updates: int, bins: int) -> str:
    if updates <= bins:
        return ""
    return f" Each {what} is the {statistic} of about {round(updates / bins)} successive updates."
