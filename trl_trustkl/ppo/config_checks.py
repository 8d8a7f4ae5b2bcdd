"""The checks of a TrustKLPPOConfig across its fields. Each error names the field, the value, what is valid and the fix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..controllers import AdaptiveKL, FixedKL, ScheduledKL
from ..divergences import gradient_kind
from ..errors import ConfigError, out_of_range
from ..rollout.generation_options import check_generation_kwargs
from ..rollout.vllm_options import check_vllm_options
from ..surrogates import WITHOUT_RANGE
from ..trust.limits import HARD_LIMITS, reject_moving_reference
from .vllm_fields import check_vllm

logger = logging.get_logger(__name__)


def check(args: Any) -> None:
    """Raise ConfigError for a combination of fields that cannot work. transformers has made its checks before."""
    check_advantages(args)
    check_anchor(args)
    check_renewal(args)
    check_controllers(args)
    check_trust_region(args)
    check_vllm(args)
    check_generation(args)
    check_logging(args)
    check_saving(args)


def name_scale(args: Any) -> None:
    """True and False mean 'group' and 'none', as in TRL."""
    if isinstance(args.scale_rewards, bool):
        args.scale_rewards = "group" if args.scale_rewards else "none"


def check_batch(args: Any) -> None:
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if local % args.num_mini_batches:
        raise ConfigError(
            f"`num_mini_batches` got {args.num_mini_batches}; it must divide the batch of one process, "
            f"per_device_train_batch_size × gradient_accumulation_steps = {args.per_device_train_batch_size} × "
            f"{args.gradient_accumulation_steps} = {local}."
        )


def choose_best(args: Any) -> None:
    """Set `greater_is_better`; transformers would set it to True for 'kl' too, and keep the checkpoint with the largest."""
    metric = args.metric_for_best_model
    keeps_best = args.load_best_model_at_end or args.save_strategy == "best"
    if keeps_best and metric in (None, "loss", "eval_loss"):
        valid = "one that evaluate() gives: 'score', 'kl', 'length' or 'eos_rate'"
        raise out_of_range("metric_for_best_model", metric, valid, "It decides which checkpoint is the best.")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        fix = "Set eval_strategy='steps' and eval_steps, or another save_strategy."
        raise out_of_range("save_strategy", "best", "'no', 'steps' or 'epoch' without evaluations", fix)
    if metric is not None and args.greater_is_better is None:
        name = str(metric).rpartition("_")[2]  # "kl" of "eval_NAME_kl", where there are several evaluation sets
        args.greater_is_better = {"score": True, "kl": False}.get(name)
        if args.greater_is_better is None:
            valid = f"True or False with metric_for_best_model={metric!r}"
            raise out_of_range(
                "greater_is_better", None, valid, "Only 'score' (greater) and 'kl' (lower) have a default."
            )


OF_THE_VALUE = (
    "gamma", "lam", "whiten_rewards", "score_position", "vf_coef", "clip_value", "cliprange_value", "detach_value_head",
    "value_learning_rate",
)  # fmt: skip
"""The fields that only GAE and the value read."""


def check_advantages(args: Any) -> None:
    estimator = args.advantage_estimator
    defaults = {name: each.default for name, each in args.__dataclass_fields__.items()}
    if estimator != "grpo" and args.scale_rewards != defaults["scale_rewards"]:
        raise ConfigError(
            f"`scale_rewards` got {args.scale_rewards!r} with advantage_estimator={estimator!r}, which does not scale; leave "
            "it out, or use advantage_estimator='grpo'."
        )
    if args.has_value:
        return
    if args.num_generations < 2:
        raise ConfigError(
            f"`num_generations` got {args.num_generations} with advantage_estimator={estimator!r}; it must be at least 2: the "
            "responses to one prompt are compared with each other. 4 to 16 are common."
        )
    for name in OF_THE_VALUE:
        if (value := getattr(args, name)) != defaults[name]:
            raise ConfigError(
                f"`{name}` got {value!r} with advantage_estimator={estimator!r}, which has no value and ignores it; it must be "
                f"its default, {defaults[name]!r}: leave it out, or use advantage_estimator='gae'."
            )


def check_anchor(args: Any) -> None:
    if args.build_kl_estimator() is None and args.kl_estimator_kwargs:
        raise ConfigError(f"`kl_estimator_kwargs` got {args.kl_estimator_kwargs}, but 'exact' takes no options.")
    if args.anchored and gradient_kind(args.kl_estimator, args.kl_placement) == "zero":
        raise ConfigError(
            f"`kl_placement` got {args.kl_placement!r} with kl_estimator={args.kl_estimator!r}: the expected gradient of "
            "that term is zero, so it would only add noise; use kl_placement='reward', or an estimator such as 'exact' or "
            "'k3' with kl_placement='both'."
        )
    if args.kl_offpolicy and args.kl_placement == "reward":
        raise ConfigError(
            "`kl_offpolicy` got True with kl_placement='reward'; it weights a KL term in the loss: "
            "choose kl_placement='loss' or 'both', or leave it False."
        )


def check_renewal(args: Any) -> None:
    if args.sync_ref_model and not args.anchored:
        raise ConfigError(
            "`sync_ref_model` got True with kl_coef=0 and kl_controller='fixed': without an anchor, the reference has no "
            "effect. Set kl_coef above 0, or leave sync_ref_model False."
        )
    reject_moving_reference(args.anchor_max_kl, moves=args.sync_ref_model)
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        value = getattr(args, name)
        if not args.sync_ref_model and value != args.__dataclass_fields__[name].default:
            raise ConfigError(f"`{name}` got {value}, but sync_ref_model=False ignores it; set sync_ref_model=True.")


def check_controllers(args: Any) -> None:
    for prefix in ("kl", "trust"):
        name, target = getattr(args, f"{prefix}_controller"), getattr(args, f"{prefix}_target")
        if isinstance(args.build_controller(prefix), (FixedKL, ScheduledKL)) and target is not None:
            raise ConfigError(
                f"`{prefix}_target` got {target}, but {prefix}_controller={name!r} ignores it; "
                f"choose {prefix}_controller='adaptive', or leave {prefix}_target None."
            )
    check_horizons(args, args.per_device_train_batch_size * args.gradient_accumulation_steps)


def check_horizons(args: Any, episodes: int) -> None:
    """ConfigError if one update of `episodes` responses could change the sign of an adaptive coefficient."""
    for prefix in ("kl", "trust"):
        controller = args.build_controller(prefix)
        if not isinstance(controller, AdaptiveKL) or controller.largest_change(episodes) < 1:
            continue
        plain = prefix == "kl" and "horizon" not in (args.kl_controller_kwargs or {})
        raise out_of_range(
            "kl_horizon" if plain else f"{prefix}_controller_kwargs['horizon']",
            controller.horizon,
            f"above {controller.clip * episodes:g}, clip × responses of an update = {controller.clip:g} × {episodes}",
            f"With {2 * controller.clip * episodes:g}, one update changes the coefficient by at most 50 %.",
        )


def check_trust_region(args: Any) -> None:
    args.build_surrogate()
    if args.clip_rule in WITHOUT_RANGE and args.cliprange_high is not None:
        raise ConfigError(
            f"`cliprange_high` got {args.cliprange_high} with clip_rule={args.clip_rule!r}, which has no range; leave it "
            "None."
        )
    if args.measure_fraction != 1.0:
        for name in HARD_LIMITS:
            if (limit := getattr(args, name)) is not None:
                raise ConfigError(
                    f"`measure_fraction` got {args.measure_fraction}; it must be 1 with {name}={limit}: "
                    "a guarantee needs the complete batch, not a subset."
                )


def check_generation(args: Any) -> None:
    if args.stop_token is not None and args.stop_token_id is not None:
        raise ConfigError(
            f"`stop_token` got {args.stop_token!r} and `stop_token_id` got {args.stop_token_id}; set only one of them."
        )
    given = args.arguments("generation_kwargs")
    if args.use_vllm:
        check_vllm_options(given, corrected=args.vllm_importance_sampling_correction)
    else:
        check_generation_kwargs(given)


def check_logging(args: Any) -> None:
    if args.num_completions_to_print is not None and not args.log_completions:
        raise ConfigError(
            f"`num_completions_to_print` got {args.num_completions_to_print}, but log_completions=False ignores it; set "
            "log_completions=True."
        )


def check_saving(args: Any) -> None:
    folder = Path(args.output_dir)
    in_the_way = [str(place) for place in (folder, *folder.parents) if os.path.isfile(place)]
    if in_the_way or args.output_dir == "":
        why = f"{in_the_way[0]} is a file." if in_the_way else "It has no name."
        raise out_of_range("output_dir", args.output_dir, "a folder, or one that can be created", why)
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise out_of_range("output_dir", args.output_dir, "the name of a folder", f"{error}.") from None
    if args.enable_jit_checkpoint:
        # transformers' handler would replace ours for SIGTERM, and write checkpoints that may be incomplete.
        logger.warning("`enable_jit_checkpoint` is ignored: this trainer saves on SIGTERM and Ctrl-C by itself.")
        args.enable_jit_checkpoint = False
