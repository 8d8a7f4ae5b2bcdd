"""The parts of a trainer, each built once with what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from datasets import IterableDataset
from torch import nn

from ..parallel.engines import build_sharding
from ..parallel.processes import Processes
from ..parallel.sharding import Replicated
from ..policy.forward import ForwardPass
from ..policy.merged_weights import merged_weights
from ..policy.quantization import is_quantized
from ..policy.renewal import ReferenceRenewal
from ..rollout.engine import RolloutEngine
from ..rollout.engines import build_engine, corrects, is_other
from ..rollout.groups import GroupedOrder
from ..rollout.prompt_stream import StreamOrder
from ..rollout.prompts import Collator, PromptOrder
from ..rollout.sampling import Rollouts
from ..rollout.scorer import Scorer
from ..run.failure_handling import FailureHandling
from ..run.recorder import Recorder
from ..run.resume_compatibility import RunSettings, setup_of
from ..run.signals import StopRequest
from ..run.state import Progress
from ..trl_compat.ddp import set_ddp_options
from ..trust.limits import TrustRegion
from ..types import Prompts, Scored
from .attribution import Attribution
from .coefficients import Coefficients
from .config import TrustKLPPOConfig
from .evaluation import Evaluator
from .models import Models
from .optimise import Optimisation, adopt
from .scoring import Scoring
from .setup import (
    set_batch_sizes,
    warn_of_frozen_anchor,
    warn_of_gradient,
    warn_of_horizons,
    warn_of_unused_fields,
)
from .sharding_checks import reject_unsharded


class Parts:
    """What the trainer delegates to.

    Args:
        optimizers: the user's optimizer and scheduler, each None where it was not given.
        callbacks: returns the callbacks of the run.
        score_held_out: samples and scores a batch of an evaluation set; see `Evaluator`.
        engine: the user's rollout engine; None: the one that `args` describe.
    """

    def __init__(
        self,
        args: TrustKLPPOConfig,
        models: Models,
        accelerator: Accelerator,
        *,
        optimizers: tuple[Any, Any],
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None,
        callbacks: Callable[[], Sequence[Any]],
        score_held_out: Callable[[Prompts, int], Scored],
        engine: RolloutEngine | None = None,
    ) -> None:
        optimizer, scheduler = optimizers
        if optimizer is not None:
            adopt(optimizer, models.trained, rate=args.value_learning_rate, scheduled=scheduler is not None)
        warn_of_unused_fields(args)
        set_ddp_options(accelerator, args)
        warn_of_gradient(args)
        warn_of_frozen_anchor(args)
        self.models = models
        self.processes = processes = Processes(accelerator)
        self.sharding = sharding = build_sharding(accelerator, saves=args.should_save)
        if sharding.sharded:
            trained = models.trained
            named = {"model": trained.policy, "ref_model": models.reference.model, "value_model": trained.value_model}
            reject_unsharded(args, named, optimizer)
        rows = None if isinstance(models.train, IterableDataset) else len(models.train)
        self.sizes = set_batch_sizes(args, rows=rows, processes=processes.count)
        warn_of_horizons(args, self.sizes)
        for func in models.reward_funcs:
            _place(getattr(func, "model", None), lambda model: model.to(processes.device))
        _place(models.reference.model, lambda model: sharding.place(model, processes.device))
        prompts = self.sizes.batch // args.num_generations
        order = (
            StreamOrder(prompts, self.sizes.updates) if rows is None else PromptOrder(rows, prompts, args.prompt_seed)
        )
        self.order = GroupedOrder(order, args.num_generations)
        self.collate = Collator(data_collator, models.tokenizer.pad_token_id, processes.device)
        self.stop = StopRequest(args.grace_seconds)
        self.rollouts = rollouts(args, models, accelerator.autocast, processes, self.stop, sharding, engine)
        self.failures = FailureHandling(self.stop, processes, in_step=sharding.sharded)
        self.forward = ForwardPass(models.trained, accelerator.autocast, sharding)
        self.scorer = Scorer(
            models.reward_funcs, models.reward_weights, batch_size=args.per_device_train_batch_size,
            retries=args.reward_retries, wait=self.stop.wait,
        )  # fmt: skip
        self.scoring = Scoring(
            args, models, processes, self.forward, self.scorer, self.failures, self.sizes.micro_batch,
            corrects=corrects(args, self.rollouts.engine), other_sampler=is_other(self.rollouts.engine),
        )  # fmt: skip
        self.renewal = ReferenceRenewal(models.reference) if args.sync_ref_model else None
        self.optimisation = Optimisation(args, models.trained, accelerator, processes, sharding)
        self.coefficients = Coefficients(args)
        self.attribution = Attribution(args, self.optimisation, self.coefficients, processes)
        self.trust_region = TrustRegion(args.limits)
        self.evaluator = Evaluator(args, models, processes, self.collate, self.rollouts, score_held_out, sharding)
        self.recorder = Recorder(callbacks, processes)
        self.progress = Progress()
        self.settings = RunSettings(args, setup_of(models.trained, rows=rows, processes=processes.count))


def _place(model: nn.Module | None, place: Callable[[nn.Module], Any]) -> None:
    """Move a model to its device; a quantised one is there already."""
    if model is not None and not is_quantized(model):
        place(model)


def rollouts(
    args: TrustKLPPOConfig,
    models: Models,
    autocast: Callable[[], AbstractContextManager[Any]],
    processes: Processes,
    stop: StopRequest,
    sharding: Replicated,
    engine: RolloutEngine | None,
) -> Rollouts:
    """Sampling with the user's engine, or the one that `args` describe."""
    policy = models.trained.policy
    found = build_engine(
        args, policy, engine, stop_ids=models.stop_ids, tokenizer=models.tokenizer, processes=processes, autocast=autocast,
        stop=stop, sharding=sharding,
    )  # fmt: skip
    return Rollouts(
        found, lambda: merged_weights(policy, sharding=sharding), processes, vocabulary=models.token_limits.vocabulary,
        length=args.response_length, pad_token_id=models.tokenizer.pad_token_id, together=sharding.shards_weights,
    )  # fmt: skip
