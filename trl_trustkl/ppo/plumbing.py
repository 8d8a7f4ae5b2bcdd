"""What a trainer owes transformers: optimizer groups, state, callbacks. A mixin, so that the trainer shows the algorithm."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import TrainerControl
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..callbacks.bound_report import BoundReportCallback, is_report
from ..divergences import gradient_kind
from ..errors import DataError, Interrupted, SaveError
from ..policy.loading import trainable
from ..policy.quantization import is_quantized
from ..rollout.prompts import PromptOrder, collate
from ..run import resume_compatibility as settings
from ..run import rng
from ..run.rng import RngStream
from ..run.signals import StopRequest
from ..run.state import OnlineTrainerState
from ..trust.snapshot import Refusals, UpdateSnapshot
from ..types import Batch, BoundRecord, MicroBatch, Prompts, TokenOutputs, UpdateStats
from .optimise import Optimisation, adopt
from .unsupported import sharding_error

logger = logging.get_logger(__name__)


class Plumbing:
    """See the module. The trainer that mixes it in has the phases."""

    control: TrainerControl
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    _created_lr_scheduler: bool
    _refused: str | None
    _warned_of_sampler = False
    _sampling_key: tuple[int, int] = (RngStream.EVALUATE, 0)  # of the update in hand, while there is one
    _bad_reward: str | None = None
    _saved_step: int = 0
    _start: UpdateSnapshot | None = None

    # -- construction --------------------------------------------------------------------------------------------------

    def _setup(self, user_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None) -> None:
        """What depends on the accelerator: batch arithmetic, order of prompts, controllers, models on their device."""
        args, processes = self.args, self.accelerator.num_processes
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise sharding_error("DeepSpeed" if self.is_deepspeed_enabled else "FSDP")
        self._user_collator = user_collator
        args.world_size = processes
        args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.micro_batch_size = args.per_device_train_batch_size * processes
        args.batch_size = args.local_batch_size * processes
        args.check_horizons(args.batch_size)
        args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
        args.mini_batch_size = args.local_mini_batch_size * processes
        if args.total_episodes is None:
            args.total_episodes = math.ceil(args.num_train_epochs * len(self.train_dataset))
        args.num_total_batches = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.total_episodes / args.batch_size)
        )
        # A micro-batch divides a mini-batch evenly, so that any micro-batch can go into any mini-batch.
        sizes = range(1, min(args.per_device_train_batch_size, args.local_mini_batch_size) + 1)
        self._micro_size = max(size for size in sizes if args.local_mini_batch_size % size == 0)
        self._order = PromptOrder(len(self.train_dataset), args.batch_size, args.seed)
        self.kl_controller = args.build_kl_controller()
        self.kl_state = self.kl_controller.init()
        self.trust_controller = args.build_trust_controller()
        self.trust_state = self.trust_controller.init()
        self.lr_controller = args.build_lr_controller()
        self.lr_state = self.lr_controller.init() if self.lr_controller is not None else None
        for module in [self.reference.model, *(getattr(func, "model", None) for func in self.reward_funcs)]:
            if module is not None and not is_quantized(module):
                module.to(self.accelerator.device)
        if hasattr(self.model.policy, "add_model_tags"):
            self.model.policy.add_model_tags(self._tag_names)
        if self.optimizer is not None:
            rate = args.value_learning_rate
            adopt(self.optimizer, self.model, rate=rate, scheduled=self.lr_scheduler is not None)
        self.state = self._fresh_state()
        self._config = settings.compared(args)  # as the run was set up: callbacks may change `args` later
        self._stop_request = StopRequest(args.grace_seconds)
        if args.anchored:
            _warn_of_gradient(args)

    def _fresh_state(self) -> OnlineTrainerState:
        return OnlineTrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=[
                cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)
            ],
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """TRL's optimizer, with the value's parameters in groups of their own for their learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args)
        rate = self.args.value_learning_rate
        value = {id(p) for p in self.model.value.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in value]
            if mine:
                group["params"] = [p for p in group["params"] if id(p) not in value]
                settings = {key: setting for key, setting in group.items() if key != "params"}
                optimizer.add_param_group({**settings, "params": mine, "lr": group["lr"] if rate is None else rate})
        return optimizer

    def add_callback(self, callback: Any) -> None:
        """As in transformers; a BoundReportCallback takes the place of the one there, or every record would come twice."""
        if is_report(callback):
            self.remove_callback(BoundReportCallback)
        super().add_callback(callback)

    # -- the loop's bookkeeping ----------------------------------------------------------------------------------------

    def _begin_training(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """A fresh state, or that of a checkpoint; then TRL's callbacks."""
        args = self.args
        self.is_in_train = True
        self.interrupted: int | None = None
        folder = self._find_checkpoint(resume_from_checkpoint)
        self.state = self._fresh_state()
        self._refusals = Refusals()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._logged_step, self._saved_step = 0, 0
        self._last_loss = 0.0
        self._prepare_optimisation()
        if folder is not None:
            self._restore_run(folder)
        self._clear_output(folder)
        self._set_up_state()
        self._started, self._episodes_before = time.perf_counter(), self.state.episode
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and folder is None:
            self.evaluate()
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        if folder is not None:
            self._restore_random_states(folder)

    def _set_up_state(self) -> None:
        """What the state says of this process and of the length of the run."""
        args = self.args
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = math.ceil(args.num_total_batches / self._order.batches_per_pass)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.compute_steps(args, self.state.max_steps)

    def _prepare_optimisation(self) -> None:
        """Wrap model and optimizer for the hardware, once; a second train() starts a new schedule."""
        args = self.args
        if self.model_wrapped is self.model:
            self.create_optimizer()
            self.model.train()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_scheduler(num_training_steps=args.num_total_batches)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.model.train()
        self._optimisation = Optimisation(
            accelerator=self.accelerator,
            model=self.model_wrapped,
            optimizer=self.optimizer,
            policy_parameters=trainable(self.model.policy),
            value_parameters=trainable(self.model.value),
            args=args,
        )

    def _begin_update(self) -> None:
        self._random_states = rng.capture()
        self._start = None
        self._bad_reward = None
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        self.state.episode += self.args.batch_size
        self._sampling_key = (RngStream.GENERATE, self.state.global_step)
        self._seconds: dict[str, float] = {}
        self._update_started = time.perf_counter()
        self._refused = None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add what runs inside to this update's `seconds`."""
        self._give_up_if_overdue()
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def _end_update(self, batch: Batch, stats: UpdateStats, record: BoundRecord) -> None:
        """Hand the record to whoever wants it, move the controllers, and let the callbacks decide what comes next."""
        args = self.args
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self._order.batches_per_pass
        self.lr_scheduler.step()
        self._move_controllers(record)
        self._warn_of_sampler(record)
        if args.torch_empty_cache_steps and self.state.global_step % args.torch_empty_cache_steps == 0:
            clear_device_cache()
        self._last_loss = stats.total.policy_loss + args.vf_coef * stats.total.value_loss
        completions = self._completion_rows(batch)
        self._hand_out(record, completions)
        for name, value in self._update_metrics(batch, stats, record).items():
            self._metrics[name].append(value)
        self._refusals = self._refusals.after(record.refused is not None)
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        run_is_over = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        pass_is_over = run_is_over or self.state.global_step % self._order.batches_per_pass == 0
        if pass_is_over:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        self._print_samples()
        # Once, with nothing of this update to come: a checkpoint saved here holds all of it.
        self._act_on_control()
        if pass_is_over and not run_is_over:
            self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        self._stop_if_refused_too_often(record.refused)

    def _hand_out(self, record: BoundRecord, completions: list[dict[str, Any]]) -> None:
        """Give the record to the callbacks of the first process; SaveError on all processes where it cannot be written."""
        failure: SaveError | None = None
        if self.is_world_process_zero():
            try:
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_record"):
                        callback.on_record(self.args, self.state, self.control, record=record, completions=completions)
            except SaveError as error:
                failure = error
        self._raise_everywhere(failure)

    def _warn_of_sampler(self, record: BoundRecord) -> None:
        """Say once that responses are not the policy's own, where nothing that was asked for explains it."""
        kl = record.sampler.kl
        if self._warned_of_sampler or kl is None or not kl > _MISMATCH or self.args.generation_kwargs:
            return
        self._warned_of_sampler = True
        logger.warning(
            f"update {record.update}: `model` says other things when it generates than when it is trained, by "
            f"{kl:.3g} nats per token (sampler/kl): the responses are not its own, and no gradient of them is right. Some "
            "architectures mistake padding for text, in one of the two or in both: give prompts of one length, or set "
            "per_device_train_batch_size=1 and local_rollout_forward_batch_size=1. With bf16=True, try bf16=False."
        )

    def _move_controllers(self, record: BoundRecord) -> None:
        """Feed the controllers the exact KL, which is 0 at least up to rounding: a negative estimate never reaches them.

        Those of the trust region see the KL that was proposed, before enforcement hid how far the update went.
        """
        episodes = self.args.batch_size
        anchor, trust = record.anchor.kl_exact, record.trust.kl_proposed
        if math.isfinite(anchor):
            self.kl_state = self.kl_controller.update(self.kl_state, kl=max(0.0, anchor), episodes=episodes)
        if math.isfinite(trust) and record.refused is None:
            self.trust_state = self.trust_controller.update(self.trust_state, kl=max(0.0, trust), episodes=episodes)
            if self.lr_controller is not None:
                self.lr_state = self.lr_controller.update(self.lr_state, kl=max(0.0, trust), episodes=episodes)

    @property
    def _lr_factor(self) -> float:
        return 1.0 if self.lr_state is None else self.lr_state.coef

    @contextmanager
    def _learning_rate_by_kl(self) -> Iterator[None]:
        """The policy's scheduled learning rate times the controller's factor, inside only: the schedule never sees it."""
        policy = {id(p) for p in trainable(self.model.policy)}
        groups = [g for g in self.optimizer.param_groups if any(id(p) in policy for p in g["params"])]
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self._lr_factor
        try:
            yield
        finally:
            for group, rate in zip(groups, scheduled, strict=True):
                group["lr"] = rate

    def _act_on_control(self) -> None:
        """Log, evaluate and save where a callback asked for it."""
        if self.control.should_log and self.state.global_step > self._logged_step:
            self._flush_metrics()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            if self.args.metric_for_best_model is not None:
                better = self._determine_best_metric(metrics=metrics, trial=None)
                if self.args.save_strategy == "best":
                    self.control.should_save = better
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _end_training(self) -> TrainOutput:
        """The last words of a run; one that a signal ended is saved first, and raises Interrupted last."""
        if self.interrupted is not None:
            self._save_what_is_done()
        elif self.args.load_best_model_at_end:
            self._load_best_model()
        if self.state.global_step > self._logged_step and self.args.logging_strategy != "no":
            self._flush_metrics()
        seconds = time.perf_counter() - self._started
        episodes = self.state.episode - self._episodes_before
        metrics = {"train_runtime": seconds, "train_samples_per_second": episodes / max(seconds, 1e-9)}
        metrics["refused_updates"] = self._refusals.total
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._act_on_control()
        self._create_final_card()
        self.is_in_train = False
        if self.interrupted is not None:
            raise Interrupted(self.interrupted)
        return TrainOutput(self.state.global_step, self._last_loss, metrics)

    # -- shared by the phases ------------------------------------------------------------------------------------------

    def _pooled(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, the same on each."""
        return self.accelerator.gather(tensor)

    def _generator(self, draw: RngStream) -> torch.Generator:
        """A stream of random numbers for one use in this update, on this process."""
        return rng.generator(self.args.seed, draw, self.state.global_step, self.accelerator.process_index)

    def _forward_only(self, micro: MicroBatch, **wanted: Any) -> TokenOutputs:
        """A forward pass without a backward."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.model(micro, **wanted)

    def _collate(self, rows: list[dict[str, Any]]) -> Prompts:
        """Prompts of dataset rows, by the user's collator where there is one."""
        if self._user_collator is None:
            return collate(rows, self.processing_class.pad_token_id, self.accelerator.device)
        batch = self._user_collator([{k: row[k] for k in ("input_ids", "attention_mask") if k in row} for row in rows])
        if "attention_mask" not in batch and len({len(row["input_ids"]) for row in rows}) > 1:
            raise DataError(
                "`data_collator` made `input_ids` of prompts of different lengths and no `attention_mask`; it must return "
                "one, since a pad token may be a prompt's own too. DataCollatorWithPadding does."
            )
        ids = batch["input_ids"].to(self.accelerator.device)
        mask = (
            batch["attention_mask"].to(ids.device).bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
        )
        # A tokenizer may pad on the right, which a model cannot go on from.
        prompts = [{"input_ids": row[counts]} for row, counts in zip(ids, mask, strict=True)]
        return collate(prompts, self.processing_class.pad_token_id, ids.device)._replace(rows=rows)


_MISMATCH = 0.05
"""Nats per token between sampler and training pass, ten times what rounding makes."""

_GRADIENT_WARNINGS = {
    "biased": "its gradient is that of something else than the KL divergence, so the run settles somewhere else too",
    "partial": "its gradient is only a part of the KL divergence's: it leaves out the cost of this token or of later ones",
}


def _warn_of_gradient(args: Any) -> None:
    """Say once, in plain words, that an anchor does not pull the way its name suggests."""
    kind = gradient_kind(args.kl_estimator, args.kl_placement)
    if kind in _GRADIENT_WARNINGS:
        logger.warning(
            f"kl_estimator={args.kl_estimator!r} with kl_placement={args.kl_placement!r} is a {kind} anchor: "
            f"{_GRADIENT_WARNINGS[kind]}. kl_estimator='k1' with kl_placement='reward', and 'exact' with 'both', pull the way "
            "the KL divergence does. The record's anchor/gradient says which kind a run used."
        )
