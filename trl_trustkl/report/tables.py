"""The tables of a report: settings, updates, completions, and several runs side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..records import BoundRecord
from ..surrogates import SEQUENCE_RANGE
from .schema import Completion, Run
from .series import (
    column,
    distance,
    first_third,
    largest,
    last_third,
    mean,
    of_groups,
    reference_per_token,
    to_reference,
    token_range,
)
from .text import number, percent, shortened

ROWS = 200  # of the table of updates
SHOWN = 4  # completions of an update, and prompts that recur
OPTIONS = "options"
"""The group of a run's settings with every field of the trainer's configuration."""
NOTHING = number(None)  # the cell of a number that is not on record


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


class Moment(NamedTuple):
    """Completions of one update: `when` is start, middle or end."""

    when: str
    update: int
    samples: list[Completion]


def settings(run: Run) -> Table:
    """What ran where, as the run wrote it, and the settings that are on record; of one that changed during the run, the first
    and last value."""
    recorded = _settings_of_groups(run.records) if of_groups(run.records) else _settings_of_ppo(run.records)
    return Table(["mechanism", "setting", "value"], [*_identity(run), *recorded])


def _identity(run: Run) -> list[list[str]]:
    """The model, the versions and the hardware, the trainer, the seed and the controllers."""
    groups, options = dict(run.settings), run.settings.get(OPTIONS, {})
    groups.pop(OPTIONS, None)
    rows = [[shortened(group, 40), *_shortened(pair)] for group, values in groups.items() for pair in values.items()]
    chosen = {name: value for name, value in options.items() if name == "seed" or "controller" in name}
    trainer = run.records[-1].trainer
    rows += [["run", "trainer", shortened(trainer, 40)]] if trainer is not None else []
    return rows + [["run", *_shortened(pair)] for pair in chosen.items()]


def options(run: Run) -> Table:
    """Every option of the trainer's configuration, as the run wrote them; no rows if it wrote none."""
    return Table(["option", "value"], [_shortened(pair) for pair in sorted(run.settings.get(OPTIONS, {}).items())])


def _shortened(pair: tuple[str, str]) -> list[str]:
    return [shortened(pair[0], 80), shortened(pair[1], 300)]


def _settings_of_ppo(r: Sequence[BoundRecord]) -> list[list[str]]:
    """By the names of the fields of TrustKLPPOConfig."""
    rows = [
        ["anchor", "kl_estimator, kl_placement", f"{_over(r, _estimator)}; its gradient is {_over(r, _gradient)}"],
        ["anchor", "β (kl_coef)", _numbers(r, "anchor.coef")],
        ["anchor", "kl_target", _numbers(r, "anchor.target", " nats per response")],
        ["trust region", "clip_rule", _over(r, lambda record: shortened(record.trust.rule, 40))],
        ["trust region", "cliprange", _over(r, _range)],
        ["trust region", "epochs made", _numbers(r, "trust.epochs")],
        ["trust region", "trust_coef", _numbers(r, "trust.coef")],
        ["trust region", "trust_max_kl", _numbers(r, "trust.limit", " nats per token")],
        *_further_limits(r),
        ["optimiser", "learning rate", _numbers(r, "lr")],
        ["optimiser", "max_grad_norm", _numbers(r, "gradient.max_norm")],
        ["value", "cliprange_value", _numbers(r, "value.clip")],
        ["batch", "episodes per update", _episodes(r)],
    ]
    if r[-1].advantage is not None:
        rows[-2] = ["advantages", "advantage_estimator, num_generations", _over(r, _advantages)]
    return rows


def _settings_of_groups(r: Sequence[BoundRecord]) -> list[list[str]]:
    """Those of TRL's GRPO and RLOO trainers, by the names of their fields; without those that are not on record."""
    placement = f"{_over(r, _estimator)}; its gradient is {_over(r, _gradient)}"
    rows = [
        ["anchor", "estimator", placement] if (column(r, "anchor.coef") > 0).any() else ["anchor", "beta", "off"],
        ["anchor", "beta", _numbers(r, "anchor.coef")],
        ["anchor", "kl_target", _numbers(r, "anchor.target_per_token", " nats per token")],
        ["trust region", "epsilon, epsilon_high", _over(r, _range)],
        ["trust region", "passes made (num_iterations)", _numbers(r, "trust.epochs")],
        ["trust region", "trust_max_kl", _numbers(r, "trust.limit", " nats per token")],
        *_further_limits(r),
        ["optimiser", "learning rate", _numbers(r, "lr")],
        ["optimiser", "max_grad_norm", _numbers(r, "gradient.max_norm")],
        ["batch", "episodes per generation batch", _episodes(r)],
    ]
    if not (column(r, "anchor.coef") > 0).any():
        del rows[1]
    return rows


def _further_limits(r: Sequence[BoundRecord]) -> list[list[str]]:
    """Those of response masks and of the hard limits per token, per response and of the anchor that are on."""
    rows = [
        ["trust region", "response_mask_kl", _numbers(r, "trust.mask_limit", " nats")],
        ["trust region", "trust_max_kl_token", _numbers(r, "trust.limit_token", " nats")],
        ["trust region", "trust_max_kl_response", _numbers(r, "trust.limit_response", " nats per response")],
        ["anchor", "anchor_max_kl", _numbers(r, "anchor.limit", " nats per response")],
    ]
    return [row for row in rows if row[2] != "off"]


def _estimator(record: BoundRecord) -> str:
    return f"{shortened(record.anchor.estimator, 40)} in the {shortened(record.anchor.placement, 40)}"


def _gradient(record: BoundRecord) -> str:
    return shortened(record.anchor.gradient, 40)


def _advantages(record: BoundRecord) -> str:
    found = record.advantage
    return (
        "gae"
        if found is None
        else f"{shortened(found.estimator, 40)}, {found.num_generations:,} responses to each prompt"
    )


def _range(record: BoundRecord) -> str:
    if record.trust.rule == "none":
        return "off"
    if record.trust.rule in SEQUENCE_RANGE:
        return f"a response's mean ratio from 1 - {number(record.trust.low)} to 1 + {number(record.trust.high)}"
    clip = token_range(record.trust)
    return "none: the rule has no range" if clip is None else f"ratio in [{number(clip[0], 2)}, {number(clip[1], 2)}]"


def _over(records: Sequence[BoundRecord], of_record: Callable[[BoundRecord], str]) -> str:
    first, last = of_record(records[0]), of_record(records[-1])
    return first if first == last else f"{first} → {last}"


def _numbers(records: Sequence[BoundRecord], key: str, unit: str = "") -> str:
    values = column(records, key)
    if not np.isfinite(values).any():
        return "off"
    first, last = number(values[0]), number(values[-1])
    text = first if first == last else f"{first} → {last}"
    low, high = number(float(np.nanmin(values))), number(float(np.nanmax(values)))
    within = "" if {low, high} <= {first, last} else f" (between {low} and {high})"
    return text + unit + within


def _episodes(records: Sequence[BoundRecord]) -> str:
    if len(records) == 1:
        return f"{records[0].episode:,}"
    return f"{round(float(np.median(np.diff(column(records, 'episode'))))):,}"


UPDATE_COLUMNS: dict[str, Callable[[BoundRecord], str]] = {
    "update": lambda r: f"{r.update:,}",
    "score": lambda r: number(r.score),
    "length": lambda r: number(r.length),
    "KL to ref": lambda r: number(float(distance([r])[0])),
    "β": lambda r: number(r.anchor.coef),
    "anchor": lambda r: percent(r.anchor.share),
    "gated": lambda r: percent(r.trust.gated),
    "KL/token": lambda r: number(r.trust.kl),
    "proposed": lambda r: number(r.trust.kl_proposed),
    "limit": lambda r: number(r.trust.limit),
    "scale": lambda r: number(r.trust.scale),
    "max ratio": lambda r: number(r.trust.max_ratio),
    "grad norm": lambda r: number(r.gradient.norm),
    "sampler KL": lambda r: number(None if r.sampler.truncated is None else r.sampler.kl),
    "truncated": lambda r: percent(r.sampler.truncated),
    "lr": lambda r: number(r.lr),
    "seconds": lambda r: number(r.seconds.get("total")),
    "bound by": lambda r: (
        f"rejected: {shortened(r.refused, 80)}"
        if r.refused is not None
        else f"backtrack ({shortened(r.trust.decided, 40)})"
        if r.binding == "backtrack" and r.trust.decided is not None
        else shortened(r.binding, 40)
    ),
}


def updates(run: Run) -> Table:
    """A row for each update; for a long run ROWS of them, evenly spaced, with the first and the last. Columns of which nothing
    is on record are left out."""
    chosen = np.unique(np.linspace(0, len(run.records) - 1, min(ROWS, len(run.records))).round().astype(int))
    columns = {title: [cell(run.records[i]) for i in chosen] for title, cell in UPDATE_COLUMNS.items()}
    columns = {title: cells for title, cells in columns.items() if set(cells) != {NOTHING}}
    return Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def recurring(run: Run) -> list[list[Moment]]:
    """For each of up to SHOWN prompts that were recorded both in the first and in the last third of the updates: its
    completions at the start and the end, and in the middle where it was recorded there too. Those with a middle come first.
    """
    kept = sorted({row.update for row in run.completions})
    early, late = first_third(kept), last_third(kept)
    of_prompt: dict[str, dict[int, Completion]] = {}
    for row in run.completions:
        of_prompt.setdefault(row.prompt, {}).setdefault(row.update, row)
    found = []
    for rows in of_prompt.values():
        start, end = min(rows), max(rows)
        if start == end or start > early[-1] or end < late[0]:
            continue
        between = [update for update in rows if early[-1] < update < late[0]]
        middle = [min(between, key=lambda update: abs(2 * update - start - end))] if between else []
        chosen = zip(["start", *("middle" for _ in middle), "end"], [start, *middle, end], strict=True)
        found.append([Moment(when, update, [rows[update]]) for when, update in chosen])
    return sorted(found, key=len, reverse=True)[:SHOWN]


def moments(run: Run) -> list[Moment]:
    """The first completions recorded at the start, in the middle and at the end of the run."""
    kept = sorted({row.update for row in run.completions})
    if not kept:
        return []
    middle = {kept[len(kept) // 2]: "middle"} if len(kept) > 2 else {}
    chosen = middle | {kept[-1]: "end"} | {kept[0]: "start"}
    found: dict[int, list[Completion]] = {update: [] for update in chosen}
    for row in run.completions:
        if row.update in found and len(found[row.update]) < SHOWN:
            found[row.update].append(row)
    return [Moment(chosen[update], update, samples) for update, samples in sorted(found.items())]


COMPARED: dict[str, Callable[[Run], str]] = {
    "updates": lambda run: f"{len(run.records):,}",
    "score, last third": lambda run: number(mean(last_third(column(run.records, "score")))),
    "KL to the reference, last third (nats per response)": lambda run: number(mean(last_third(distance(run.records)))),
    "KL target": lambda run: _target(run.records),
    "β, first → last": lambda run: _numbers(run.records, "anchor.coef"),
    "clip rule": lambda run: shortened(run.records[-1].trust.rule, 40),
    "largest KL(π_old‖π) of an update (nats per token)": lambda run: number(largest(column(run.records, "trust.kl"))),
    "updates over the limit, as proposed": lambda run: _over_limit(run),
    "largest guaranteed bound (nats per token)": lambda run: number(largest(column(run.records, "trust.guaranteed"))),
    "largest ratio": lambda run: number(largest(column(run.records, "trust.max_ratio"))),
    "reference's likelihood, last third (nats per token)": lambda run: number(
        mean(last_third(reference_per_token(run)[1]))
    ),
    "limited most often by": lambda run: shortened(Counter(r.binding for r in run.records).most_common(1)[0][0], 40),
    "rejected updates": lambda run: f"{sum(r.refused is not None for r in run.records):,}",
}


def _target(records: Sequence[BoundRecord]) -> str:
    _, target, unit = to_reference(records)
    return number(target[-1]) + (" per token" if np.isfinite(target[-1]) and unit == "nats per token" else "")


def _over_limit(run: Run) -> str:
    limit, proposed = column(run.records, "trust.limit"), column(run.records, "trust.kl_proposed")
    return percent(float((proposed > limit).mean())) if np.isfinite(limit).any() else "no limit"


def comparison(runs: Sequence[Run]) -> Table:
    rows = [[title, *map(of_run, runs)] for title, of_run in COMPARED.items()]
    return Table(["", *[run.name for run in runs]], [row for row in rows if set(row[1:]) != {NOTHING}])
