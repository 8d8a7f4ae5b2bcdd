"""The parts of a trainer, each built once with what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from ..parallel.processes import Processes
from ..policy.forward import ForwardPass
from ..rollout.engine import RolloutEngine
from ..rollout.prompts import Collator, PromptOrder, prepare_datasets
from ..rollout.scorer import Scorer
from ..rollout.transformers_engine import TransformersEngine
from ..run.failure_handling import FailureHandling
from ..run.recorder import Recorder
from ..run.resume_compatibility import RunSettings, setup_of
from ..run.signals import StopRequest
from ..run.state import Progress
from ..trust.limits import Limits, TrustRegion
from ..types import Prompts, Scored
from .coefficients import Coefficients
from .config import TrustKLPPOConfig
from .evaluation import Evaluator
from .models import Models
from .optimise import Optimisation, adopt
from .scoring import Scoring
from .setup import BatchSizes, micro_batch_size, place, set_batch_sizes, warn_of_gradient


@dataclass
class Parts:
    """What the trainer delegates to."""

    processes: Processes
    sizes: BatchSizes
    order: PromptOrder
    collate: Collator
    engine: RolloutEngine
    forward: ForwardPass
    scorer: Scorer
    scoring: Scoring
    optimisation: Optimisation
    coefficients: Coefficients
    trust_region: TrustRegion
    evaluator: Evaluator
    stop: StopRequest
    failures: FailureHandling
    recorder: Recorder
    progress: Progress
    settings: RunSettings
    stop_ids: list[int]


def build(
    args: TrustKLPPOConfig,
    models: Models,
    accelerator: Accelerator,
    *,
    optimizers: tuple[Any, Any],
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None,
    callbacks: Callable[[], Sequence[Any]],
    score_held_out: Callable[[Prompts, int], Scored],
) -> Parts:
    """Build the parts, and put the models that are not trained on their device.

    optimizers: optimizer and scheduler of the user's, or None. callbacks: those of the run, now. score_held_out: samples
    and scores prompts of an evaluation; see `Evaluator`.
    """
    processes = Processes(accelerator)
    optimizer, scheduler = optimizers
    if optimizer is not None:
        adopt(optimizer, models.trained, rate=args.value_learning_rate, scheduled=scheduler is not None)
    warn_of_gradient(args)
    sizes = set_batch_sizes(args, rows=len(models.train), processes=processes.count)
    place([models.reference.model, *(getattr(func, "model", None) for func in models.reward_funcs)], processes.device)
    stop = StopRequest(args.grace_seconds)
    failures = FailureHandling(stop, processes)
    forward = ForwardPass(models.trained, accelerator.autocast)
    collate = Collator(data_collator, models.tokenizer.pad_token_id, processes.device)
    scorer = _scorer(args, models, stop)
    return Parts(
        processes=processes,
        sizes=sizes,
        order=PromptOrder(len(models.train), sizes.batch, args.seed),
        collate=collate,
        engine=_engine(args, models, accelerator),
        forward=forward,
        scorer=scorer,
        scoring=Scoring(
            args,
            forward=forward,
            reference=models.reference,
            scorer=scorer,
            failures=failures,
            tokenizer=models.tokenizer,
            stop_ids=models.stop_ids,
            micro_batch_size=micro_batch_size(args),
            process=processes.index,
        ),
        optimisation=Optimisation(args, models.trained, accelerator, processes),
        coefficients=Coefficients(args),
        trust_region=TrustRegion(Limits(args.trust_max_kl, args.panic_kl)),
        evaluator=_evaluator(args, models, processes, collate, score_held_out),
        stop=stop,
        failures=failures,
        recorder=Recorder(callbacks, processes),
        progress=Progress(),
        settings=_settings(args, models, processes),
        stop_ids=models.stop_ids,
    )


def _scorer(args: TrustKLPPOConfig, models: Models, stop: StopRequest) -> Scorer:
    return Scorer(
        models.reward_funcs,
        models.reward_weights,
        batch_size=args.per_device_train_batch_size,
        retries=args.reward_retries,
        wait=stop.wait,
    )


def _engine(args: TrustKLPPOConfig, models: Models, accelerator: Accelerator) -> RolloutEngine:
    return TransformersEngine(
        models.trained.policy,
        response_length=args.response_length,
        temperature=args.temperature,
        stop_ids=models.stop_ids,
        pad_token_id=models.tokenizer.pad_token_id,
        batch_size=args.local_rollout_forward_batch_size,
        autocast=accelerator.autocast,
        generation_kwargs=args.arguments("generation_kwargs"),
    )


def _evaluator(
    args: TrustKLPPOConfig,
    models: Models,
    processes: Processes,
    collate: Collator,
    score: Callable[[Prompts, int], Scored],
) -> Evaluator:
    def tokenize(dataset: Dataset) -> Dataset:
        return prepare_datasets(dataset, None, models.tokenizer, models.token_limits, args)[0]

    return Evaluator(
        score=score,
        collate=collate,
        tokenize=tokenize,
        model=models.trained,
        tokenizer=models.tokenizer,
        stop_ids=models.stop_ids,
        processes=processes,
        batch_size=args.per_device_eval_batch_size,
    )


def _settings(args: TrustKLPPOConfig, models: Models, processes: Processes) -> RunSettings:
    setup = setup_of(
        models.trained.policy,
        models.trained.value,
        rows=len(models.train),
        vocab_size=models.trained.split_lm.vocab_size,
        processes=processes.count,
    )
    return RunSettings(args, setup)
