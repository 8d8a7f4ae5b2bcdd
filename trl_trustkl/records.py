"""The record of an update: its fields, and its JSON line, written after each update and read back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from .errors import DataError, SaveError
from .files import replacing

BOUNDS_FILE = "bounds.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
SETTINGS_FILE = "run_settings.json"


class Meaning(NamedTuple):
    """What a field of a record means, and its unit; docs/metrics.md is made from these."""

    text: str
    unit: str = ""


# fmt: off
# The meanings form a table and stay on the lines of their fields.

class AnchorRecord(NamedTuple):
    estimator: Annotated[str, Meaning("`kl_estimator`: the formula of the anchor.")]
    placement: Annotated[str, Meaning("`kl_placement`: where the anchor acts.")]
    gradient: Annotated[str, Meaning(
        "What the anchor's gradient is: `exact`, `partial`, `biased` or `zero` ([table](mathematics.md#gradients)).")]
    coef: Annotated[float, Meaning("The coefficient β that this update used.")]
    target: Annotated[float | None, Meaning(
        "`kl_target`, or `null`; with GRPO and RLOO the target per token × the mean length.", "nats/response")]
    kl: Annotated[float, Meaning(
        "KL(π_old‖π_ref) at rollout by the estimator; from samples it may be negative.", "nats/response")]
    kl_exact: Annotated[float, Meaning(
        "The same over the full vocabulary, summed over a response: the input of PPO's controllers.", "nats/response")]
    kl_stderr: Annotated[float, Meaning(
        "Standard error of `anchor/kl_exact` over the responses of the batch.", "nats/response")]
    share: Annotated[float | None, Meaning(
        "The anchor's share of the absolute advantage, before whitening; `null` with `kl_placement=\"loss\"`.", "share")]
    kl_per_token: Annotated[float | None, Meaning(
        "`anchor/kl` as a mean over tokens: the unit of GRPO and RLOO.", "nats/token")] = None
    target_per_token: Annotated[float | None, Meaning(
        "The target where it is given per token, as with GRPO and RLOO; else `null`.", "nats/token")] = None
    renewed: Annotated[bool | None, Meaning(
        "Whether the reference was renewed after this update (`sync_ref_model`); `null` with GRPO and RLOO.")] = None
    limit: Annotated[float | None, Meaning("`anchor_max_kl`, or `null`.", "nats/response")] = None
    kl_after: Annotated[float | None, Meaning(
        "**Measured** after the update and its enforcement: the exact KL(π‖π_ref) on the contexts of this batch; `null` "
        "without `anchor_max_kl`.", "nats/response")] = None
    guaranteed: Annotated[float | None, Meaning(
        "**Guaranteed**: `anchor/kl_after` is within it, on the contexts of this batch: `anchor_max_kl`, or `anchor/kl_exact` "
        "where that was above it before the update. The next batch has other contexts, on which the KL may be larger.",
        "nats/response")] = None


class CertificateRecord(NamedTuple):
    gain: Annotated[float, Meaning(
        "The surrogate's estimate of the improvement by this update: the mean of (reward − mean of the other rewards) × "
        "Σ(π/π_old − 1). The update was fitted to this batch, so it is optimistic.", "the reward's")]
    stderr: Annotated[float, Meaning("Standard error of the gain over the responses of the batch.", "the reward's")]
    bound: Annotated[float, Meaning(
        "The smallest of the bounds on the surrogate's error; the largest KL and total variation of the batch and the range of "
        "its rewards stand for those of all contexts and responses.", "the reward's")]
    difference: Annotated[float, Meaning(
        "`gain` − `bound`. Above two standard errors the update is certified on its batch.", "the reward's")]
    smallest: Annotated[str, Meaning(
        "The bound that was smallest: `classical`, `pinsker_marginal`, `mixed`, `classical_tv`, `mixed_tv` or `adaptive` "
        "([bounds](mathematics.md#bounds)).")]
    kl_needed: Annotated[float | None, Meaning(
        "The largest `trust/kl_max` at which a shorter step in the same direction would be certified, if the gain is "
        "proportional to the length of the step; `trust/kl_max` itself for a certified update, `null` where the gain is not "
        "above two standard errors.", "nats")]


class TrustRecord(NamedTuple):
    rule: Annotated[str, Meaning("`clip_rule`.")]
    low: Annotated[float, Meaning(
        "The clip range of a ratio (gspo: a response's) begins at 1 − `low`; `null` for a rule without one.")]
    high: Annotated[float, Meaning("It ends at 1 + `high`; `null` for a rule without one.")]
    gated: Annotated[float, Meaning("**Gated**: what the clip rule removed of Σ|w·A| over all steps of the update.", "share")]
    gated_low: Annotated[float, Meaning("The part of `trust/gated` removed where π/π_old is below 1.", "share")]
    gated_high: Annotated[float, Meaning("The part of `trust/gated` removed where π/π_old is above 1.", "share")]
    coef: Annotated[float, Meaning("The coefficient λ of the penalty on KL(π_old‖π) that this update used.")]
    epochs: Annotated[float, Meaning("Passes made over the batch: the optimizer's steps, as epochs.", "epochs")]
    stopped: Annotated[bool, Meaning("Whether `trust_stop` ended the update.")]
    kl: Annotated[float, Meaning(
        "**Measured** after the update and its enforcement: mean exact KL(π_old‖π) over the batch's contexts.", "nats/token")]
    kl_max: Annotated[float, Meaning("The largest KL(π_old‖π) of any context of the batch.", "nats")]
    kl_proposed: Annotated[float, Meaning("`trust/kl` after the last optimizer step, before enforcement.", "nats/token")]
    tv: Annotated[float, Meaning("Mean total variation between π_old and π, from 0 to 1.")]
    max_ratio: Annotated[float, Meaning("Largest π/π_old of a sampled token, after the update.")]
    ratio_quantiles: Annotated[dict[str, float], Meaning("Quantiles of that ratio, by their level.")]
    scale: Annotated[float | None, Meaning(
        "Share of the step that was kept: 1 if all limits were met, 0 if the update was rejected or no shorter step met the "
        "limits, `null` without a hard limit.", "share")]
    tries: Annotated[int, Meaning("Scales that backtracking tried.")]
    limit: Annotated[float | None, Meaning("`trust_max_kl`, or `null`.", "nats/token")]
    guaranteed: Annotated[float | None, Meaning(
        "**Guaranteed**: a number only where `trust_max_kl` was enforced on the complete batch; then `trust/kl` is within it.",
        "nats/token")]
    kl_response_max: Annotated[float | None, Meaning(
        "The largest sum of KL(π_old‖π) over one response.", "nats/response")] = None
    limit_token: Annotated[float | None, Meaning("`trust_max_kl_token`, or `null`.", "nats")] = None
    limit_response: Annotated[float | None, Meaning("`trust_max_kl_response`, or `null`.", "nats/response")] = None
    guaranteed_token: Annotated[float | None, Meaning(
        "**Guaranteed**: `trust/kl_max` is within it, where `trust_max_kl_token` was enforced on the complete batch.",
        "nats")] = None
    guaranteed_response: Annotated[float | None, Meaning(
        "**Guaranteed**: `trust/kl_response_max` is within it, where `trust_max_kl_response` was enforced on the complete "
        "batch.", "nats/response")] = None
    decided: Annotated[str | None, Meaning(
        "The hard limit that determined how much of the step was kept, by the name of its field: `trust_max_kl`, "
        "`trust_max_kl_token`, `trust_max_kl_response` or `anchor_max_kl`; `null` for a step that was not shortened.")] = None
    certificate: Annotated[CertificateRecord | None, Meaning(
        "**Certified** where `difference` is above twice `stderr`: whether the surrogate's gain exceeds the bound on its "
        "error, as far as the batch shows ([certificate](mathematics.md#certificate)). A statement about this batch, not a "
        "proof. `null` for a rejected update, a batch measured in part, or fewer than two responses with a reward.")] = None
    mask_limit: Annotated[float | None, Meaning("`response_mask_kl`, or `null`.", "nats")] = None
    masked: Annotated[float | None, Meaning(
        "**Gated**: what response masks left out of Σ|w·A| over all steps of the update; `null` with TRL's trainers.",
        "share")] = None
    masked_responses: Annotated[float | None, Meaning(
        "The responses that they left out, of those in all steps of the update; `null` with TRL's trainers.", "share")] = None


class ValueRecord(NamedTuple):
    clip: Annotated[float | None, Meaning(
        "`cliprange_value`, or `null` with `clip_value=False`. Without a value all of these are `null`.", "the return's")]
    gated: Annotated[float, Meaning("Positions at which the clip removed the value's gradient.", "share")]
    explained_variance: Annotated[float, Meaning(
        "The share of the returns' variance that the value explains: 1 is all, 0 no more than a constant.", "share")]


class AdvantageRecord(NamedTuple):
    estimator: Annotated[str, Meaning("`advantage_estimator`: `grpo` or `rloo`.")]
    num_generations: Annotated[int, Meaning("Responses to each prompt.", "responses")]
    groups: Annotated[int, Meaning("Groups of responses to one prompt in the batch.", "groups")]
    groups_without_signal: Annotated[int, Meaning(
        "Those in which every reward is equal or `null`, so that their advantages are 0.", "groups")]


class GradientRecord(NamedTuple):
    norm: Annotated[float, Meaning("Mean norm of the policy's gradient before clipping.")]
    max_norm: Annotated[float | None, Meaning("`max_grad_norm`, or `null`.")]
    scale: Annotated[float, Meaning("Mean factor by which clipping multiplied the gradient.", "share")]


class SamplerRecord(NamedTuple):
    kl: Annotated[float | None, Meaning(
        "KL(sampler‖training forward pass) before any step (k3); near 0 unless sampling is filtered or the two disagree. "
        "`null` where the sampler gives no log-probabilities.", "nats/token")]
    ratio_min: Annotated[float | None, Meaning(
        "The smallest ratio of π_old, in the training forward pass, to the sampler's probability of a sampled token, before "
        "any bound; `null` where the sampler gives no log-probabilities, and with TRL's trainers.")] = None
    ratio_max: Annotated[float | None, Meaning("The largest of these ratios.")] = None
    truncated: Annotated[float | None, Meaning(
        "Tokens whose importance weight a bound changed ([correction](mathematics.md#importance-correction)); `null` where the "
        "policy's loss is not weighted by these ratios.", "share")] = None


class RolloutRecord(NamedTuple):
    engine: Annotated[str, Meaning(
        "What sampled the responses: `TransformersEngine`, `ColocatedVLLMEngine`, `VLLMServerEngine`, or the class of a custom "
        "engine.")]


class BoundRecord(NamedTuple):
    """One update, as a line of `bounds.jsonl`."""

    update: Annotated[int, Meaning("The update's number, from 1.")]
    episode: Annotated[int, Meaning("Responses sampled so far, over all processes.", "responses")]
    score: Annotated[float | None, Meaning("Mean score of the responses that have one; `null` where none has.", "the reward's")]
    length: Annotated[float, Meaning("Mean length of a response, its stop token included.", "tokens")]
    eos_rate: Annotated[float, Meaning(
        "Responses that ended with a stop token or a stop string, not at `response_length`.", "share")]
    entropy: Annotated[float, Meaning("Mean entropy of π_old at the contexts of the batch.", "nats/token")]
    lr: Annotated[float, Meaning("Learning rate of this update, `trust_lr_target`'s factor included.")]
    refused: Annotated[str | None, Meaning(
        "Why the update was rejected and rolled back, as text; `null` for an update that was kept.")]
    seconds: Annotated[dict[str, float], Meaning(
        "Time in `sync`, in which the rollout engine got the policy's weights, `generate`, `score`, `optimise` and `measure`, "
        "and in all: `total`.", "s")]
    anchor: AnchorRecord
    trust: TrustRecord
    value: ValueRecord
    gradient: GradientRecord
    sampler: SamplerRecord
    binding: Annotated[str, Meaning(
        "The mechanism that limited the update most: `anchor`, `clip`, `response_mask`, `penalty`, `stop`, `backtrack`, "
        "`grad_norm`, `lr` or `value_clip`. By `counterfactual` where there is one: the mechanism without which the KL would "
        "have been largest. Otherwise the one with the largest of `shares`, without `grad_norm` under an optimizer that "
        "rescales gradients, such as Adam. `none` where that is less than 1 % of the update, or the update was rejected.")]
    shares: Annotated[dict[str, float] | None, Meaning(
        "The share of the update in which each of these mechanisms intervened, which need not be the share by which it "
        "changed the outcome; `null` for an update that was rejected. With GRPO and RLOO, of those whose share is known. "
        "(That of the penalty is its part of the pull on the sampled tokens.)", "share")] = None
    rewards: Annotated[dict[str, float | None] | None, Meaning(
        "Mean reward of each reward function, by its name.", "the reward's")] = None
    counterfactual: Annotated[dict[str, float | None] | None, Meaning(
        "**Counterfactual**: the `trust/kl` that the same update would have had without each of these mechanisms, and "
        "without `value_clip`; `null` for one that is off. `null` in updates that `attribution_every` leaves out.",
        "nats/token")] = None
    trainer: Annotated[str | None, Meaning(
        "The trainer: `TrustKLPPOTrainer`, or TRL's `GRPOTrainer`, `RLOOTrainer` or `PPOTrainer`, subclasses included.")] = None
    advantage: Annotated[AdvantageRecord | None, Meaning(
        "Advantages that were made from groups of responses; `null` with `advantage_estimator=\"gae\"` and with TRL's "
        "trainers.")] = None
    rollout: Annotated[RolloutRecord | None, Meaning("What sampled; `null` with TRL's trainers.")] = None
# fmt: on


def as_dict(record: Any) -> Any:
    """A record as plain dicts; a number that is not finite becomes None, as JSON has no such numbers."""
    if hasattr(record, "_asdict"):
        return {key: as_dict(value) for key, value in record._asdict().items()}
    if isinstance(record, dict):
        return {key: as_dict(value) for key, value in record.items()}
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record


def flatten(record: BoundRecord | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, with keys such as `trust/kl`."""
    flat: dict[str, Any] = {}
    for key, value in as_dict(record).items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_rows(columns: dict[str, list[Any]], count: int | None = None) -> list[dict[str, Any]]:
    """The rows of a table that is given by its columns; `count` rows, also if there is no column."""
    if not columns:
        return [{} for _ in range(count or 0)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_json(value: Any, **options: Any) -> str:
    """JSON that can be written as UTF-8; text that cannot, such as half of an emoji, makes it ASCII with escapes."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a line and flush it, so that a killed run keeps every finished update; SaveError where that fails."""
    text = as_json(row, allow_nan=False) + "\n"
    failure = f"the record of update {row.get('update')} could not be appended to {path}"
    with written(failure), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def written(failure: str) -> Iterator[None]:
    """Turn an OSError inside into a SaveError; `failure` says what could not be done."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"`output_dir`: {failure} ({error}). Make room or fix the folder, then train(resume_from_checkpoint=True)."
        ) from error


def cut(path: Path, *, after: int) -> None:
    """Drop the lines of later updates, and a truncated last line, for a run that resumes `after` an update. Atomic."""
    if not path.exists():
        return
    with open(path, "rb") as old, replacing(path, durable=True) as new:
        new.writelines(line for line in old if _update_of(line) <= after)


def take_over(source: Path, folder: Path) -> None:
    """Copy the records of the run in `source`, for one that resumes in another `folder`; older files there are renamed."""
    if source.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (BOUNDS_FILE, COMPLETIONS_FILE):
        move_aside(folder / name)
    copy(source, folder)


def copy(source: Path, folder: Path) -> None:
    """Copy the records and completions of a run, where there are any, into another folder."""
    for name in (BOUNDS_FILE, COMPLETIONS_FILE):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _update_of(line: bytes) -> float:
    """The number of a line's update; infinity for a line that is not a record."""
    try:
        return float(json.loads(line)["update"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def move_aside(path: Path) -> None:
    """Rename a file left by an earlier run to the first free `name.1`, `name.2`, …"""
    if not path.exists():
        return
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, target)


def load_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, one dict per update, from its folder or its `bounds.jsonl`.

    Raises DataError for a missing file or a line that is not a JSON object; a last line truncated by a kill is left out.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     append_line(Path(run) / "bounds.jsonl", {"update": 1, "binding": "clip"})
    ...     load_records(run)
    [{'update': 1, 'binding': 'clip'}]
    """
    file = Path(path)
    file = file / BOUNDS_FILE if file.is_dir() else file
    return [row for _, row in numbered_rows(file) if row is not None]


def numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The rows of a file with their line numbers; None for a last line truncated by a kill. DataError as `load_records`."""
    if not file.exists():
        raise DataError(f"no records at {file}; give a run's output_dir, or its {BOUNDS_FILE}.")
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _row(line, f"{file}, line {number}")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None


def _row(line: bytes, where: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None
        raise DataError(f"{where}: not a JSON record ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, got {type(row).__name__}.")
    return row
