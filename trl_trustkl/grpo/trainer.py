"""TrustKLGRPOTrainer and TrustKLRLOOTrainer: TRL's trainers with the callbacks of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import GRPOTrainer, RLOOTrainer

from ..callbacks import AdaptiveKLCallback, BoundReportCallback, TrustRegionCallback
from ..callbacks.bound_report import report_of
from ..errors import ConfigError, DataError
from ..policy.precision import avoid_bf16
from ..report import model_card
from .config import TrustKLGRPOConfig, TrustKLRLOOConfig, build_kl_controller


class TrustKLGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with a trust region, a controller of `beta`, and a record of what bounded each update.

    It has the arguments of `GRPOTrainer`; `args` is a `TrustKLGRPOConfig`. It adds a `TrustRegionCallback`, a
    `BoundReportCallback` unless `callbacks` has one, and with a `kl_controller` an `AdaptiveKLCallback`. The model card gets a
    section on what bounded the run. Nothing else is changed.

    Raises ConfigError for another kind of configuration, DataError for fewer rows than a generation batch takes, and the errors
    of these callbacks.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **options: Any) -> None:
        args = checked(args, TrustKLGRPOConfig, default=f"{_name_of(model)}-GRPO")
        super().__init__(model, reward_funcs, args, *others, **options)
        avoid_bf16(self.model, args)
        add_callbacks(self, args)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write TRL's card into output_dir, with a section on how far the run may have moved the model."""
        super().create_model_card(*arguments, **options)
        describe(self)


class TrustKLRLOOTrainer(RLOOTrainer):
    """TRL's `RLOOTrainer` with a trust region, a controller of `beta`, and a record of what bounded each update.

    It has the arguments of `RLOOTrainer`; `args` is a [`TrustKLRLOOConfig`]. See `TrustKLGRPOTrainer`.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **options: Any) -> None:
        args = checked(args, TrustKLRLOOConfig, default=f"{_name_of(model)}-RLOO")
        super().__init__(model, reward_funcs, args, *others, **options)
        avoid_bf16(self.model, args)
        add_callbacks(self, args)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write TRL's card into output_dir, with a section on how far the run may have moved the model."""
        super().create_model_card(*arguments, **options)
        describe(self)


def describe(trainer: Any) -> None:
    """Add the section to the card that TRL has written, from the records so far."""
    if trainer.is_world_process_zero():
        report = report_of(trainer.callback_handler.callbacks)
        folder, page = Path(trainer.args.output_dir), None if report is None else report.rendered
        model_card.describe(folder, trainer.args, update=trainer.state.global_step, report=page)


def checked(args: Any, kind: type[Any], *, default: str) -> Any:
    """The configuration; one with the default settings and that output folder for None."""
    if args is None:
        return kind(default)
    if not isinstance(args, kind):
        raise ConfigError(
            f"`args` got a {type(args).__name__}; it must be a {kind.__name__}, which has the same fields and those of the "
            "trust region."
        )
    return args


def _name_of(model: Any) -> str:
    """The last part of a model's name, as TRL names the output folder."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name).rstrip("/").split("/")[-1]


def _check_rows(trainer: Any, args: Any) -> None:
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    needed = args.generation_batch_size // args.num_generations
    if rows is not None and rows < needed:
        raise DataError(
            f"`train_dataset` has {rows} rows, and a generation batch takes {needed} prompts (generation_batch_size / "
            f"num_generations = {args.generation_batch_size} / {args.num_generations}): TRL leaves out an incomplete batch, so "
            "that no update would be made. Give more rows, or a smaller batch."
        )


def add_callbacks(trainer: Any, args: TrustKLGRPOConfig | TrustKLRLOOConfig) -> None:
    """Add the callbacks that the configuration describes. DataError for a dataset with which TRL would make no update."""
    _check_rows(trainer, args)
    if report_of(trainer.callback_handler.callbacks) is None:
        trainer.add_callback(BoundReportCallback())
    if args.kl_controller != "fixed":
        trainer.add_callback(AdaptiveKLCallback(build_kl_controller(args, args.beta), trainer=trainer))
    trainer.add_callback(
        TrustRegionCallback(
            trainer,
            max_kl=args.trust_max_kl,
            max_kl_token=args.trust_max_kl_token,
            max_kl_response=args.trust_max_kl_response,
            anchor_max_kl=args.anchor_max_kl,
            stop=args.trust_stop,
            lr_target=args.trust_lr_target,
            panic_kl=args.panic_kl,
        )
    )
