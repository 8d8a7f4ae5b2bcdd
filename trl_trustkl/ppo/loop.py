"""The training loop: begin or resume a run, make its updates, do what callbacks request, save, end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import TrainerControl
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..errors import CheckpointError, Interrupted
from ..policy.loading import gathered_weights
from ..policy.quantization import ready_to_train
from ..policy.value_head import PolicyAndValue
from ..records import BoundRecord
from ..report import model_card
from ..rollout.reward_log import with_means
from ..run import checkpoint_folder, rng
from ..run.checkpointer import (
    POLICY_FILE,
    REFERENCE_FILE,
    RESUME_FILES,
    RNG_FILE,
    RUN_FILE,
    VALUE_FILE,
    Checkpointer,
    read_json,
)
from ..run.failure_handling import too_many_rejections
from ..run.signals import Overdue
from ..run.state import OnlineTrainerState, RunState, TransformersState
from ..run.weights import ShardedOptimizer, TrainedWeights
from ..types import Batch, Enforcement, Measurement, Prompts, Rollout, Scored, UpdateContext, UpdateStats
from . import recording
from .config import TrustKLPPOConfig
from .evaluation import compare_with_best
from .parts import Parts
from .setup import warn_of_sampler
from .unsupported import reject_callbacks

logger = logging.get_logger(__name__)

_REQUESTS = ("should_training_stop", "should_log", "should_evaluate", "should_save")
"""What a callback can request through transformers' TrainerControl."""


class Trainer(Protocol):
    """What the loop uses of its trainer: transformers' attributes, the phases of an update, and TRL's methods."""

    args: TrustKLPPOConfig
    parts: Parts
    model: PolicyAndValue
    accelerator: Accelerator
    state: OnlineTrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    optimizer: Any
    lr_scheduler: Any

    def prepare_optimisation(self) -> None: ...
    def event(self, name: str) -> None: ...
    def new_context(self) -> UpdateContext: ...

    def next_prompts(self) -> Prompts: ...
    def rollout(self, prompts: Prompts) -> Rollout: ...
    def score(self, rollout: Rollout) -> Scored: ...
    def advantages(self, scored: Scored) -> Batch: ...
    def optimise(self, batch: Batch) -> UpdateStats: ...
    def measure(self, batch: Batch) -> Measurement: ...
    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement: ...
    def attribute(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> dict[str, float | None]: ...
    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> BoundRecord: ...

    def evaluate(self) -> dict[str, float]: ...
    def generate_completions(self, sampling: bool = False) -> None: ...
    def log(self, logs: dict[str, Any]) -> None: ...
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...
    def create_model_card(self, model_name: str | None = None) -> None: ...

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None: ...
    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...
    def _load_callback_state(self) -> None: ...
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool: ...
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None: ...


class TrainingLoop:
    """Runs the updates of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._parts = trainer, trainer.parts
        self._warned_of_sampler, self._saved_step = False, 0
        self.interrupted: int | None = None
        """The signal that ended the run, or None."""

    def run(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        """See `TrustKLPPOTrainer.train`."""
        with self._parts.stop:
            try:
                self.begin(resume_from_checkpoint)
                while self._continues():
                    self._update()
                return self._end()
            except Overdue:  # while the run began, or in an evaluation at its end
                self.interrupted = self._parts.failures.signal()
                self._save_finished()
                raise Interrupted(self.interrupted or 0) from None
            finally:
                self._parts.rollouts.close()

    # -- one update ----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Make one update, completely or not at all."""
        trainer, state = self._trainer, self._trainer.state
        context = trainer.new_context()
        trainer.event("step_begin")
        ready_to_train(trainer.model)
        state.episode += self._parts.sizes.batch
        with self._parts.failures.update(
            finished=lambda: state.global_step > context.update,
            roll_back=lambda: self._roll_back(context),
            save=self._save_finished,
        ):
            with self._timed(context, "generate"):
                rollout = trainer.rollout(trainer.next_prompts()._replace(context=context))
            context.seconds["sync"] = context.sync_seconds
            context.seconds["generate"] -= context.sync_seconds
            with self._timed(context, "score"):
                scored = trainer.score(rollout if rollout.context is not None else rollout._replace(context=context))
                batch = trainer.advantages(scored)
            with self._timed(context, "optimise"):
                stats = trainer.optimise(batch)
            with self._timed(context, "measure"):
                proposed = trainer.measure(batch)
                context.enforcement = Enforcement(proposed.kl, scale=None, tries=0, limit=None)
                measured = trainer.enforce(batch, proposed)
            if context.attributed and context.rejected is None:
                with self._timed(context, "attribute"):
                    context.counterfactual = trainer.attribute(batch, stats, measured)
            self._end_update(batch, stats, trainer.record(batch, stats, measured))

    @contextmanager
    def _timed(self, context: UpdateContext, phase: str) -> Iterator[None]:
        """Add the duration of the block to the update's seconds."""
        self._parts.failures.give_up_if_overdue()
        started = time.perf_counter()
        yield
        if self._parts.processes.device.type == "cuda":
            torch.cuda.synchronize()
        context.seconds[phase] = context.seconds.get(phase, 0.0) + time.perf_counter() - started

    def _roll_back(self, context: UpdateContext) -> None:
        """Roll back an update that was not completed."""
        if context.snapshot is not None:
            context.snapshot.restore()
        self._parts.rollouts.weights_changed()
        self._trainer.state.episode = context.episode
        rng.restore(context.random_states)

    def _end_update(self, batch: Batch, stats: UpdateStats, record: BoundRecord) -> None:
        """Write the record, update the controllers, and do what the callbacks request."""
        trainer, parts, args, state = self._trainer, self._parts, self._trainer.args, self._trainer.state
        parts.failures.drop_closed_outputs()
        state.global_step += 1
        state.epoch = state.global_step / parts.order.batches_per_pass
        trainer.lr_scheduler.step()
        parts.coefficients.update(record, parts.sizes.batch)
        if record.refused is None:
            parts.optimisation.end(stats)
        if not self._warned_of_sampler:
            self._warned_of_sampler = warn_of_sampler(record, args)
        if args.torch_empty_cache_steps and state.global_step % args.torch_empty_cache_steps == 0:
            clear_device_cache()
        completions = recording.completion_rows(batch, parts, update=state.global_step)
        parts.recorder.write(record, completions, args=args, state=state, control=trainer.control)
        speed = (state.episode - self._episodes_before) / (time.perf_counter() - self._started)
        metrics = recording.metrics(batch, stats, record, parts, speed=speed)
        parts.progress.add(
            with_means(metrics, [batch.scored.logged.metrics], parts.processes),
            loss=stats.total.policy_loss + args.vf_coef * stats.total.value_loss,
            rejected=record.refused is not None,
        )
        if parts.renewal is not None and args.renews_reference(state.global_step):
            parts.renewal.renew(args.ref_model_mixup_alpha)
        trainer.event("step_end")
        self._agree_on_control()
        run_is_over = state.global_step >= state.max_steps or trainer.control.should_training_stop
        pass_is_over = run_is_over or state.global_step % parts.order.batches_per_pass == 0
        if pass_is_over:
            trainer.event("epoch_end")
            self._agree_on_control()
        wanted = args.num_sample_generations
        if wanted > 0 and (state.global_step - 1) % max(1, parts.sizes.updates // wanted) == 0:
            trainer.generate_completions(sampling=True)
        self._act_on_control()  # last, so that a checkpoint saved here holds the complete update
        if pass_is_over and not run_is_over:
            trainer.event("epoch_begin")
        count = parts.progress.rejections.in_a_row
        if record.refused is not None and count >= args.max_refused:
            self._save_finished()
            raise too_many_rejections(count, args.max_refused, record.refused, self._folder())

    def _agree_on_control(self) -> None:
        """Do on every process what the callbacks of any process request. A process that evaluates, saves or ends alone would
        wait for the others."""
        control = self._trainer.control
        requests = [getattr(control, name) for name in _REQUESTS]
        for name, requested in zip(_REQUESTS, self._parts.processes.any_of(requests), strict=True):
            setattr(control, name, requested)
        if control.should_epoch_stop:
            control.should_epoch_stop = False
            logger.warning(
                "A callback set `should_epoch_stop`, which has no effect: passes over the prompts are always complete."
            )

    def _act_on_control(self) -> None:
        """Log, evaluate and save where a callback requested it, on all processes."""
        trainer, control = self._trainer, self._trainer.control
        if control.should_log and trainer.state.global_step > self._parts.progress.logged_step:
            self._log()
        if control.should_evaluate:
            metrics = trainer.evaluate()
            if trainer.args.metric_for_best_model is not None:
                compare_with_best(trainer, metrics, save=self._save_finished)
            self._agree_on_control()
        if trainer.control.should_save:
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.event("save")
        control = trainer.control
        control.should_log = control.should_evaluate = control.should_save = False

    def _log(self) -> None:
        state = self._trainer.state
        logs = self._parts.progress.flush(state.global_step)
        self._trainer.log(logs | {"update": state.global_step, "episode": state.episode})

    # -- the run -------------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Set up a new state, or load that of a checkpoint, and notify the callbacks."""
        trainer, parts, args, state = self._trainer, self._parts, self._trainer.args, self._trainer.state
        reject_callbacks(trainer.callback_handler.callbacks)
        self.interrupted, self._saved_step = None, 0
        parts.progress.reset()
        vars(state).update(vars(OnlineTrainerState(stateful_callbacks=self._exportable())))
        trainer.prepare_optimisation()
        handler = trainer.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = trainer.model, trainer.optimizer, trainer.lr_scheduler
        self._checkpointer = self._new_checkpointer()
        output = Path(args.output_dir)
        folder = self._checkpointer.find(resume_from_checkpoint, output)
        if folder is not None:
            self._restore(folder)
        parts.rollouts.weights_changed()
        self._checkpointer.prepare_output(output, folder)
        state.is_local_process_zero = trainer.accelerator.is_local_main_process
        state.is_world_process_zero = parts.processes.is_main
        state.max_steps = parts.sizes.updates
        state.num_train_epochs = math.ceil(parts.sizes.updates / parts.order.batches_per_pass)
        state.train_batch_size = args.per_device_train_batch_size
        state.compute_steps(args, state.max_steps)
        parts.rollouts.check()
        self._started, self._episodes_before = time.perf_counter(), state.episode
        trainer.event("train_begin")
        if args.eval_on_start and folder is None:
            trainer.evaluate()
        trainer.event("epoch_begin")
        if folder is not None:
            self._checkpointer.load(folder, RNG_FILE)

    def _continues(self) -> bool:
        """Whether another update follows, the same on every process."""
        self.interrupted = self._parts.failures.signal()
        stopped = self.interrupted is not None or self._trainer.control.should_training_stop
        return not stopped and self._trainer.state.global_step < self._trainer.state.max_steps

    def _end(self) -> TrainOutput:
        """End the run. If a signal ended it, it is saved first, and Interrupted is raised last."""
        trainer, progress, args = self._trainer, self._parts.progress, self._trainer.args
        if self.interrupted is not None:
            self._save_finished()
            trainer.control.should_evaluate = False  # of an evaluation that was given up
        elif args.load_best_model_at_end:
            self._load_best_model()
        if trainer.state.global_step > progress.logged_step and args.logging_strategy != "no":
            self._log()
        seconds = time.perf_counter() - self._started
        episodes = trainer.state.episode - self._episodes_before
        metrics = {"train_runtime": seconds, "train_samples_per_second": episodes / max(seconds, 1e-9)}
        metrics["refused_updates"] = progress.rejections.total
        trainer.event("train_end")
        self._agree_on_control()
        self._act_on_control()
        self._write_card()
        if self.interrupted is None and (signal := self._parts.failures.signal()) is not None:
            self.interrupted = signal  # received while the run was ending
            if not args.load_best_model_at_end:  # whose weights are not those of the last update
                self._save_finished()
        if self.interrupted is not None:
            raise Interrupted(self.interrupted)
        return TrainOutput(trainer.state.global_step, progress.last_loss, metrics)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N` after N updates, unless it is written already; SaveError on all processes."""
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        if self._saved_step == state.global_step:
            return
        folder = self._folder()
        best = checkpoint_folder.of_update(folder.parent, state.best_global_step or 0)
        if best == folder or best.exists():
            state.best_model_checkpoint = str(best)
        self._checkpointer.save(folder, without=RESUME_FILES if args.save_only_model else ())
        self._saved_step = state.global_step
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(folder))
        if args.should_save:
            checkpoint_folder.rotate(folder.parent, args.save_total_limit, best=state.best_model_checkpoint)

    def _save_finished(self) -> None:
        """Save the last finished update, if there is one."""
        if self._trainer.state.global_step:
            self._trainer._save_checkpoint(self._trainer.model, trial=None)

    def _folder(self) -> Path:
        return checkpoint_folder.of_update(Path(self._trainer.args.output_dir), self._trainer.state.global_step)

    def _new_checkpointer(self) -> Checkpointer:
        trainer, parts, sharding = self._trainer, self._parts, self._parts.sharding
        held = {
            POLICY_FILE: TrainedWeights(trainer.model.policy, sharding),
            VALUE_FILE: TrainedWeights(trainer.model.value, sharding),
            REFERENCE_FILE: parts.renewal,
            TRAINER_STATE_NAME: TransformersState(trainer.state, self._exportable),
            OPTIMIZER_NAME: ShardedOptimizer(trainer.optimizer, sharding) if sharding.sharded else trainer.optimizer,
            SCHEDULER_NAME: trainer.lr_scheduler,
            SCALER_NAME: trainer.accelerator.scaler,
            RUN_FILE: RunState([parts.settings, parts.coefficients, parts.optimisation, parts.progress]),
            RNG_FILE: rng.ProcessRandomStates(parts.processes),
        }
        return Checkpointer(
            held, parts.processes, self._write_model, writes=trainer.args.should_save,
            gather_model=lambda: gathered_weights(trainer.model.policy, sharding),
        )  # fmt: skip

    def _write_model(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        """Write the model's files; `weights` are those of a sharded policy, None for any other."""
        self._write_card()
        if weights is None:
            self._trainer.save_model(str(folder), _internal_call=True)
        else:
            self._trainer._save(str(folder), weights)

    def _write_card(self) -> None:
        args = self._trainer.args
        if model_card.is_of_user(Path(args.output_dir)):
            return
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        self._trainer.create_model_card(model_name=name.split("/")[-1])

    def _exportable(self) -> list[ExportableState]:
        """The callbacks, and the control, whose state is saved in checkpoints."""
        trainer = self._trainer
        every = [*trainer.callback_handler.callbacks, trainer.control]
        return [each for each in every if isinstance(each, ExportableState)]

    def _restore(self, folder: Path) -> None:
        """Load a checkpoint, except for the random states, which are restored last."""
        self._parts.settings.check(read_json(folder / RUN_FILE), folder)
        self._checkpointer.load(folder, *(name for name in self._checkpointer.parts if name != RNG_FILE))
        self._trainer._load_callback_state()
        state = self._trainer.state
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = str(folder.with_name(Path(state.best_model_checkpoint).name))
        self._saved_step = state.global_step

    def _load_best_model(self) -> None:
        """`load_best_model_at_end`: load the weights of policy and value with the best evaluation."""
        best = self._trainer.state.best_model_checkpoint
        if best is None:
            logger.warning("`load_best_model_at_end`: no checkpoint was saved at an evaluation; the last weights stay.")
            return
        self._parts.processes.wait()
        if (what := checkpoint_folder.damage(Path(best))) is not None:
            raise CheckpointError(f"`load_best_model_at_end`: {best} is not a complete checkpoint ({what}).")
        self._checkpointer.load(Path(best), POLICY_FILE, VALUE_FILE)
        self._parts.rollouts.weights_changed()
