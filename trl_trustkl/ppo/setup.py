"""The sizes of batches, checks of trackers and evaluation, and warnings about unused fields, the anchor and the sampler."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from transformers.integrations import integration_utils
from transformers.utils import logging

from ..controllers import AdaptiveKL
from ..divergences import gradient_kind
from ..errors import ConfigError, out_of_range, shown, unknown_name
from ..records import BoundRecord
from ..trl_compat.unused_fields import COMPUTED, set_in_vain
from ..trust.limits import blocked_at_the_anchor
from .config import TrustKLPPOConfig
from .config_checks import check_horizons

logger = logging.get_logger(__name__)

MISMATCH = 0.05
"""Nats per token between sampler and training pass, ten times what rounding causes."""

_GRADIENT_WARNINGS = {
    "biased": "it is not that of the KL divergence, so the run converges to another policy",
    "partial": "it is only a part of the KL divergence's: it leaves out the cost of this token or of later ones",
}


class BatchSizes(NamedTuple):
    """Responses of one update on one process (`local`) and on all of them (`batch`); updates of the run; rows of a
    micro-batch, which divide a mini-batch evenly, so that any micro-batch can go into any mini-batch."""

    local: int
    batch: int
    updates: int
    micro_batch: int


def set_batch_sizes(args: TrustKLPPOConfig, *, rows: int | None, processes: int) -> BatchSizes:
    """Set the fields of `args` that follow from others, from the rows of the dataset (None for a stream) and the number of
    processes. A warning names those that were given another value."""
    given = {name: getattr(args, name) for name in COMPUTED}
    args.world_size = processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * processes
    args.batch_size = batch = args.local_batch_size * processes
    _check_groups(args, batch, processes)
    responses = None if rows is None else rows * args.num_generations
    check_horizons(args, args.batch_size)
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.mini_batch_size = args.local_mini_batch_size * processes
    if args.total_episodes is None:
        args.total_episodes = (
            args.max_steps * args.batch_size if responses is None else math.ceil(args.num_train_epochs * responses)
        )
    args.num_total_batches = args.max_steps if args.max_steps > 0 else math.ceil(args.total_episodes / args.batch_size)
    for name, value in given.items():
        if value not in (None, getattr(args, name)):
            logger.warning(
                f"`{name}` got {value} and is replaced by {getattr(args, name)}, which is computed from {COMPUTED[name]}; set "
                "those instead."
            )
    largest = min(args.per_device_train_batch_size, args.local_mini_batch_size)
    if responses is not None:  # no run has a batch of more
        largest = min(largest, responses)
    micro_batch = next(size for size in range(largest, 0, -1) if args.local_mini_batch_size % size == 0)
    return BatchSizes(args.local_batch_size, args.batch_size, args.num_total_batches, micro_batch)


def _check_groups(args: TrustKLPPOConfig, batch: int, processes: int) -> None:
    """ConfigError if the last prompt of a batch would have fewer responses than the others."""
    if batch % args.num_generations:
        raise ConfigError(
            f"`num_generations` got {args.num_generations}; it must divide the batch of all processes, "
            f"per_device_train_batch_size × gradient_accumulation_steps × processes = {args.per_device_train_batch_size} × "
            f"{args.gradient_accumulation_steps} × {processes} = {batch} responses; change one of them."
        )


def check_inputs(args: TrustKLPPOConfig, evaluation: Any, value_model: Any = None) -> None:
    """ConfigError for a tracker that does not exist or is not installed, for evaluations without a dataset, and for a value
    model that would not be used."""
    if value_model is not None and not args.has_value:
        got = shown(value_model) if isinstance(value_model, str) else type(value_model).__name__
        raise ConfigError(
            f"`value_model` got {got} with advantage_estimator={args.advantage_estimator!r}, which has no "
            "value; leave it None, or use advantage_estimator='gae'."
        )
    trackers = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in args.report_to:
        if name not in trackers:
            raise unknown_name("report_to", name, [*trackers, "all", "none"])
        probes = [f"is_{known}_available" for known in (name.replace("_", ""), name.removesuffix("_ml"))]
        if not all(getattr(integration_utils, probe)() for probe in probes if hasattr(integration_utils, probe)):
            raise out_of_range("report_to", name, "a tracker that is installed", f"Install {name}, or leave it out.")
    if args.eval_strategy != "no" and evaluation is None:
        raise ConfigError(
            f"`eval_strategy` got {str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} without an "
            "`eval_dataset`; pass `eval_dataset` to the trainer, or leave `eval_strategy` at 'no'."
        )
    if isinstance(evaluation, dict):
        _check_several(args, evaluation)


def _check_several(args: TrustKLPPOConfig, evaluation: dict[str, Any]) -> None:
    """ConfigError for evaluation sets of which there is none, or whose metrics have other names."""
    if not evaluation:
        raise ConfigError("`eval_dataset` got an empty dict; give datasets by their names, or None.")
    metric = args.metric_for_best_model
    if metric is not None and not metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in evaluation)):
        valid = f"the name of an evaluation set and a metric, such as '{next(iter(evaluation))}_score'"
        sets = ", ".join(map(repr, evaluation))
        raise out_of_range("metric_for_best_model", metric, valid, f"The evaluation sets are {sets}.")


def warn_of_unused_fields(args: TrustKLPPOConfig) -> None:
    """Warn once about the fields that were set and have no effect."""
    if found := set_in_vain(args):
        reasons = "; ".join(f"`{name}`: {why}" for name, why in found.items())
        logger.warning(f"These fields have no effect here. {reasons}.")


def warn_of_gradient(args: TrustKLPPOConfig) -> None:
    """Warn once about an anchor whose gradient is not that of the KL divergence."""
    kind = gradient_kind(args.kl_estimator, args.kl_placement)
    if args.anchored and kind in _GRADIENT_WARNINGS:
        logger.warning(
            f"kl_estimator={args.kl_estimator!r} with kl_placement={args.kl_placement!r} gives the KL penalty to the reference "
            f"(the anchor) a {kind} gradient: {_GRADIENT_WARNINGS[kind]}. kl_estimator='k1' with kl_placement='reward', and "
            "'exact' with 'both', have the gradient of the KL divergence. The record's anchor/gradient says which kind a run "
            "used."
        )


def warn_of_frozen_anchor(args: TrustKLPPOConfig) -> None:
    """Warn about a limit on the KL to the reference at which training may stop."""
    if args.anchor_max_kl is None or (args.kl_target is not None and args.kl_target < args.anchor_max_kl):
        return
    target = f"kl_target={args.anchor_max_kl / 2:.3g}"
    logger.warning(blocked_at_the_anchor(args.anchor_max_kl, f"kl_controller='dual' with {target}"))


def warn_of_horizons(args: TrustKLPPOConfig, sizes: BatchSizes) -> None:
    """Warn about an adaptive controller whose horizon is too short or too long for the run."""
    for name, controller in (("kl", args.build_kl_controller()), ("trust", args.build_trust_controller())):
        adaptive = isinstance(controller, AdaptiveKL)
        warning = controller.horizon_warning(sizes.batch, sizes.updates) if adaptive else None
        if warning is not None:
            logger.warning(f"{name}_controller='adaptive': {warning}")


def warn_of_sampler(record: BoundRecord, args: TrustKLPPOConfig) -> bool:
    """Warn where sampler and training pass disagree; returns whether it did. `generation_kwargs` explain a difference where the
    update was not corrected for it."""
    kl, corrected = record.sampler.kl, record.sampler.truncated is not None
    if kl is None or not kl > MISMATCH or (args.generation_kwargs and not corrected):
        return False
    if corrected:
        logger.warning(
            f"update {record.update}: the distribution that the rollout engine samples from differs from the policy's in the "
            f"training pass by {kl:.3g} nats per token (sampler/kl), far more than by rounding. The importance correction "
            "cannot compensate for a difference of this size: its weights are noisy, and biased where a bound changes them. "
            "The engine has other weights (of an earlier update, or of another model), computes in another dtype, or filters "
            "tokens by `generation_kwargs`. Give it the model and the dtype that are trained, and check that it gets the "
            "weights of every update."
        )
        return True
    logger.warning(
        f"update {record.update}: the distribution that `model` samples from differs from the one it is trained with, by "
        f"{kl:.3g} nats per token (sampler/kl): the responses are not the policy's, and their gradients are wrong. Some "
        "architectures treat padding as text. Use prompts of equal length, or set "
        "per_device_train_batch_size=1 and local_rollout_forward_batch_size=1. With bf16=True, try bf16=False."
    )
    return True
