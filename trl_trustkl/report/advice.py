"""What findings are made of: their type, and the sentences that several of them share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .schema import Run
from .series import column, is_from_trl, largest, of_groups
from .text import count, number

FEW = 3  # updates at least for a finding that has to hold in every one of them, or for a median


class Finding(NamedTuple):
    """What is wrong, the numbers that show it, and one concrete change of the configuration."""

    name: str
    title: str
    evidence: str
    advice: str


def configured_lr(run: Run) -> float:
    """The largest learning rate on record: `learning_rate` if the schedule only decays it after its warm-up.

    A run that ended during its warm-up never reached it, and `trust_lr_target` may have raised it.
    """
    return largest(column(run.records, "lr"))


def set_lr(run: Run, factor: float, in_words: str, field: str = "learning_rate") -> str:
    """The advice to set a learning rate; the records do not show whether `trust_lr_target` has raised the present one."""
    present = configured_lr(run)
    at_most = "" if is_from_trl(run.records) else "at most "
    return f"Set {field}={number(factor * present, 2)}, {in_words}, which is {at_most}{number(present)}"


def set_limit(run: Run, value: float, name: str = "max_kl") -> str:
    """The advice to set `trust_max_kl`, or another limit; for GRPO and RLOO with its name in the callback, too."""
    also = f" (with TrustRegionCallback {name}={number(value, 2)})" if of_groups(run.records) else ""
    return f"Set trust_{name}={number(value, 2)}{also}"


def weaker_anchor(run: Run) -> str:
    """The advice to halve `kl_coef`, or with a target to raise it."""
    coef, target = float(np.nanmedian(column(run.records, "anchor.coef"))), run.records[-1].anchor.target
    if target is None:
        return f"Set kl_coef={number(coef / 2, 2)}, half of the median β."
    return (
        f"Set kl_target={number(1.5 * target, 2)}, 1.5 times the last one, so that the controller settles at a lower β."
    )


def of_updates(where: NDArray[np.bool_], noun: str = "update") -> str:
    """ "3 of 12 updates"."""
    return f"{int(where.sum()):,} of {count(len(where), noun)}"
