"""Columns of a run's records as arrays, and statistics of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..records import BoundRecord, TrustRecord
from ..surrogates import SEQUENCE_RANGE, WITHOUT_RANGE
from .schema import GROUPS, Run

Column = NDArray[np.float64]

COUNTERFACTUALS = ("anchor", "clip", "response_mask", "penalty", "stop", "backtrack", "grad_norm", "lr", "value_clip")
"""The mechanisms without which an update is rerun: the keys of a record's `counterfactual`."""


def column(records: Sequence[BoundRecord], key: str) -> Column:
    """One number for each record, `key` such as "trust.kl"; NaN where there is none."""
    get = attrgetter(key)
    return np.array([np.nan if (value := get(record)) is None else value for record in records], dtype=np.float64)


def distance(records: Sequence[BoundRecord]) -> Column:
    """The KL to the reference in nats per response: the exact one where a record has it, the estimate elsewhere."""
    exact = column(records, "anchor.kl_exact")
    return np.where(np.isfinite(exact), exact, column(records, "anchor.kl"))


class ToReference(NamedTuple):
    """The KL to the reference and its target, in the unit in which the target was given."""

    kl: Column
    target: Column
    unit: str


def to_reference(records: Sequence[BoundRecord]) -> ToReference:
    """With GRPO and RLOO a target is in nats per token, otherwise in nats per response."""
    target = column(records, "anchor.target_per_token")
    if not np.isfinite(target).any():
        return ToReference(distance(records), column(records, "anchor.target"), "nats per response")
    exact = column(records, "anchor.kl_exact") / column(records, "length")
    kl = np.where(np.isfinite(exact), exact, column(records, "anchor.kl_per_token"))
    return ToReference(kl, target, "nats per token")


def of_groups(records: Sequence[BoundRecord]) -> bool:
    """Whether the records are of TRL's GRPO or RLOO trainer."""
    return records[-1].trainer in GROUPS


def is_from_trl(records: Sequence[BoundRecord]) -> bool:
    """Whether the records are of one of TRL's trainers. Records of earlier versions do not name theirs; TRL's trainers alone do
    not measure updates."""
    if (trainer := records[-1].trainer) is not None:
        return trainer in (*GROUPS, "PPOTrainer")
    keys = ("trust.kl", "anchor.kl_exact", "value.explained_variance")
    return not any(np.isfinite(column(records, key)).any() for key in keys)


def quantile(records: Sequence[BoundRecord], level: str) -> Column:
    """A quantile of the ratio after each update, such as "0.99"."""
    return np.array([record.trust.ratio_quantiles.get(level, np.nan) for record in records], dtype=np.float64)


def token_range(trust: TrustRecord) -> tuple[float, float] | None:
    """The clip range of a token's ratio; it begins at 0 for a rule without a lower end, and is None for a rule without a
    range, even if its record holds numbers, as those of earlier versions do."""
    if trust.rule in WITHOUT_RANGE | SEQUENCE_RANGE or not np.isfinite(trust.high):
        return None
    return 1 - trust.low if np.isfinite(trust.low) else 0.0, 1 + trust.high


def first_third(values: Any) -> Any:
    return values[: max(1, len(values) // 3)]


def last_third(values: Any) -> Any:
    return values[-max(1, len(values) // 3) :]


def mean(values: Column) -> float:
    """The mean of the finite values; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def stderr(values: Column) -> float:
    """Standard error of the mean of the finite values; 0 for fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1) / np.sqrt(known.size)) if known.size > 1 else 0.0


def largest(values: Column) -> float:
    """The largest finite value; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else float("nan")


def stop_share(records: Sequence[BoundRecord]) -> Column:
    """The share of its steps that an update skipped because it was stopped.

    For records of earlier versions, which lack it, the share of its epochs. The planned number of epochs is then taken to be
    the largest number made, rounded up; if every update was stopped, the result is a lower bound.
    """
    epochs = column(records, "trust.epochs")
    planned = max(np.ceil(largest(epochs)), 1.0) if np.isfinite(epochs).any() else 1.0
    stopped = np.array([record.trust.stopped for record in records])
    return _recorded(records, "stop", np.where(stopped, np.clip(1.0 - epochs / planned, 0.0, 1.0), 0.0))


def shares(records: Sequence[BoundRecord]) -> dict[str, Column]:
    """The share of each update in which each mechanism intervened; 0 for a rejected update.

    Records of earlier versions and of TRL's trainers have no `shares`; they are then derived from other keys where possible.
    """
    taken = {
        "anchor": column(records, "anchor.share"),
        "clip": column(records, "trust.gated"),
        "response_mask": np.zeros(len(records)),
        "penalty": np.zeros(len(records)),
        "stop": stop_share(records),
        "backtrack": 1.0 - column(records, "trust.scale"),
        "grad_norm": 1.0 - column(records, "gradient.scale"),
        "lr": np.zeros(len(records)),
    }
    taken = {name: _recorded(records, name, derived) for name, derived in taken.items()}
    stands = np.array([record.refused is None for record in records])
    return {name: np.where(stands, np.clip(np.nan_to_num(values), 0.0, 1.0), 0.0) for name, values in taken.items()}


def _recorded(records: Sequence[BoundRecord], name: str, derived: Column) -> Column:
    """The recorded share, and the derived one where a record has none."""
    return np.array(
        [given if r.shares is None else r.shares.get(name, 0.0) for r, given in zip(records, derived, strict=True)],
        dtype=np.float64,
    )


def attributed(records: Sequence[BoundRecord]) -> list[BoundRecord]:
    """The updates that have a counterfactual."""
    return [record for record in records if record.counterfactual is not None]


def kl_without(records: Sequence[BoundRecord]) -> dict[str, Column]:
    """The KL(π_old‖π) that each update would have had without each mechanism; NaN where it is not on record.

    Mechanisms that no record has a number for are left out.
    """
    recorded = [record.counterfactual or {} for record in records]
    columns = {
        name: np.array([np.nan if (kl := each.get(name)) is None else kl for each in recorded], dtype=np.float64)
        for name in COUNTERFACTUALS
    }
    return {name: values for name, values in columns.items() if np.isfinite(values).any()}


def factors(records: Sequence[BoundRecord]) -> dict[str, Column]:
    """`kl_without` as a multiple of the KL that the update had; NaN where either is not on record, or the latter is 0."""
    kl = column(records, "trust.kl")
    with np.errstate(all="ignore"):  # a KL near the smallest float makes the multiple overflow
        ratios = {name: without / np.where(kl > 0, kl, np.nan) for name, without in kl_without(records).items()}
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in ratios.items()}


def geometric_mean(values: Column) -> float:
    """Of the finite values, each taken as one from 1/1000 to 1000, so that a single 0 does not decide; NaN without any."""
    return float(np.exp(mean(np.log(np.clip(values[np.isfinite(values)], 1e-3, 1e3)))))


def reference_per_token(run: Run) -> tuple[Column, Column]:
    """(update, mean log π_ref of its recorded completions in nats per token), for the updates that recorded any."""
    lengths = {record.update: record.length for record in run.records}
    sums: dict[int, list[float]] = {}
    for row in run.completions:
        if row.ref_logp is not None and lengths.get(row.update, 0) > 0:
            sums.setdefault(row.update, []).append(row.ref_logp)
    updates = sorted(sums)
    means = [sum(sums[update]) / len(sums[update]) / lengths[update] for update in updates]
    return np.array(updates, dtype=np.float64), np.array(means, dtype=np.float64)
