"""TrustRegionCallback: a measured and enforced trust region for TRL's GRPO and RLOO trainers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..controllers import LearningRateByKL
from ..divergences import ESTIMATORS
from ..errors import ConfigError, ModelError
from ..parallel.engines import build_sharding
from ..parallel.processes import Processes
from ..policy.dropout import has_noise
from ..policy.observed_lm import ObservedLM, observed_reference
from ..policy.quantization import unpack_4bit_weights
from ..records import BoundRecord
from ..run.recorder import Recorder
from ..trl_compat import generation, trl_logs
from ..trl_compat.trl_trainers import GenerationTrainer
from ..trust.gradient_scale import rescales_gradients
from ..trust.learning_rate import check_adaptable, scaled_learning_rate
from ..trust.limits import Limits, blocked_at_the_anchor
from .adaptive_kl import target_of
from .bound_report import is_report, report_of
from .enforcer import Enforcer
from .trust_region_checks import (
    check_anchor_limit,
    check_options,
    check_reference,
    check_stop,
    checked_kind,
    not_repeatable,
)  # fmt: skip
from .trust_region_saving import BeforeSave, TrustRegionState, may_save, state_of
from .window import Window, share_time
from .window_record import completion_rows, enforced, tracked, window_record

logger = logging.get_logger(__name__)

CONTROLLER = (
    "kl_controller='dual' with a kl_target below it in nats per token, or add AdaptiveKLCallback(DualKL(…), trainer)"
)


class TrustRegionCallback(TrainerCallback):
    """Measures every update of TRL's GRPO or RLOO trainer exactly, and keeps it within limits.

        trainer = GRPOTrainer(...)
        trainer.add_callback(TrustRegionCallback(trainer, max_kl=0.01))

    With TRL's defaults the ratio of these trainers is always 1, so that their clipping never acts. Here the divergence
    KL(π_old‖π) of each update is computed over the vocabulary, and an update that exceeds a limit is shortened or rolled
    back. A *window* consists of the optimizer steps on one generation batch; π_old is the policy that generated it. The
    limits are on the completion tokens with a loss, under the forward pass that TRL trains: its padding, temperature and
    precision, with dropout off. Nothing of TRL is replaced or wrapped.

    Args:
        trainer: the trainer that the callback is added to.
        max_kl: hard limit of the mean KL(π_old‖π), in nats per token. It is enforced by backtracking at the end of each window
            and before the model is saved: the step is shortened on the segment from π_old to the proposed policy.
        max_kl_token: hard limit of the largest KL(π_old‖π) of one token, in nats, enforced in the same way.
        max_kl_response: hard limit of the largest sum of KL(π_old‖π) over one completion, in nats, enforced in the same way.
        anchor_max_kl: hard limit of KL(π‖π_ref), in nats per completion (summed over a completion, averaged over completions),
            on the contexts of the window, enforced in the same way. If the KL is above the limit when a window begins, the
            window must not increase it.
        stop: limit of the mean KL(π_old‖π), in nats per token, after which the remaining steps of a window change nothing.
            Their passes still run, so that no time is saved.
        lr_target: target of the mean proposed KL(π_old‖π), in nats per token. After a KL above twice the target the learning
            rate is divided by 1.5, after one below half of it multiplied by 1.5. The scheduler does not see this factor.
        panic_kl: limit of the mean KL(π_old‖π), in nats per token, before any backtracking. A window above it is rolled back,
            with the state of the optimizer.
        every: "generation" enforces the limits at the end of a window, "step" also after each of its optimizer steps. They
            are always enforced after each step if optimizer steps share generation batches (for example
            steps_per_generation=3 with gradient_accumulation_steps=2), and with enable_jit_checkpoint.
        anchor: whether the exact KL(π_old‖π_ref) is measured too, also with beta=0. π_ref is TRL's: the model with its adapter
            disabled (or with the adapter "ref"), else `ref_model`; without one it is not measured.

    With a hard limit or panic_kl, a window whose KL is not finite, or in which no token counts, is rolled back.

    The numbers are added to TRL's logs as `trust/…` and `anchor/…`, and a `BoundReportCallback` of the same trainer writes a
    record for each generation batch. Several processes (DDP, FSDP2, ZeRO-2, ZeRO-3) measure and decide together. State for
    resuming is saved in checkpoints.

    Raises:
        ConfigError: an option is out of range; anchor_max_kl has no reference that stays the same; or the trainer is not
            supported: it has no generation batches, fills them with earlier responses, has an option of FSDP or
            DeepSpeed that is not available, an optimizer that steps within the backward pass, or images in its dataset.
        ModelError: the model's passes are random even without dropout.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        max_kl: float | None = None,
        max_kl_token: float | None = None,
        max_kl_response: float | None = None,
        anchor_max_kl: float | None = None,
        stop: float | None = None,
        lr_target: float | None = None,
        panic_kl: float | None = None,
        every: Literal["generation", "step"] = "generation",
        anchor: bool = True,
    ) -> None:
        limits = Limits(max_kl, panic_kl, max_kl_token, max_kl_response, anchor_max_kl)
        check_options(limits._asdict() | {"stop": stop, "lr_target": lr_target}, every, anchor)
        self.kind = checked_kind(trainer)
        self.trainer: GenerationTrainer = trainer
        self._check_added(0)
        if stop is not None:
            check_stop(stop, trainer)
        self.stop = stop
        self.every = every
        self.processes = Processes(trainer.accelerator)
        self._sharding = build_sharding(trainer.accelerator, saves=trainer.args.should_save)
        with self._sharding.loaded(trainer.model):
            self.model = ObservedLM(
                trainer.model, autocast=trainer.accelerator.autocast, temperature=trainer.temperature,
                sharding=self._sharding,
            )  # fmt: skip
        if anchor:
            check_reference(trainer, self.processes)
        self.reference = observed_reference(trainer, self.model, self._sharding) if anchor else None
        check_anchor_limit(anchor_max_kl, trainer, measured=self.reference is not None)
        self.limits = limits
        self._enforcer = Enforcer(
            trainer, self.model, limits, sharding=self._sharding,
            reference=None if self.reference is None else self.reference.model,
        )  # fmt: skip
        self.lr_controller = None if lr_target is None else LearningRateByKL(lr_target)
        self._recorder = Recorder(lambda: trainer.callback_handler.callbacks, self.processes)
        self._before_save = BeforeSave(self)
        self._rates = ExitStack()
        self._run = ExitStack()
        self._rescaled = True
        self._rate, self._factor = 0.0, 1.0
        self.leave()
        if self.lr_controller is not None:
            self._lr_state = self.lr_controller.init()
            if state_of(trainer.callback_handler.callbacks) is None:
                trainer.add_callback(TrustRegionState())
            self._store()

    def leave(self) -> None:
        """Leave the run, also one that an error ended or from which this callback was removed; and prepare for the next."""
        self._rates.close()
        self._run.close()
        self._training = False
        self.shared_steps = generation.steps_are_shared(self.trainer)
        saves_any_time = self.trainer.args.enable_jit_checkpoint  # a checkpoint on SIGTERM
        self.every_step = self.every == "step" or (self._enforcer.limited and (self.shared_steps or saves_any_time))
        self._windows: list[Window] = []
        self._closed: list[tuple[Window, int]] = []  # windows that ended, by the number of steps made, not yet recorded
        self._batch: object = None
        self._enforcer.drop_snapshot()
        self._metrics = generation.NewMetrics(self.trainer)
        self._may_reuse = not has_noise(self.trainer.model) and not self.trainer.args.torch_compile
        self._checked = False
        self._held = False

    def _check_added(self, count: int) -> None:
        if sum(isinstance(each, TrustRegionCallback) for each in self.trainer.callback_handler.callbacks) > count:
            raise ConfigError(
                "The trainer got two TrustRegionCallbacks; both would enforce limits. Add one with all limits."
            )

    # -- the run -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        own: object = self.trainer.args
        if args is not own or self not in callbacks:
            raise ConfigError("`trainer` is not the trainer that this TrustRegionCallback was added to; give that one.")
        self._check_added(1)
        if (count := sum(map(is_report, callbacks))) > 1:
            raise ConfigError(
                f"The trainer got {count} BoundReportCallbacks; each would write every record. Give yours in `callbacks` when "
                "the trainer is built, or call trainer.remove_callback(BoundReportCallback) before you add it."
            )
        self.leave()
        if self.stop is not None:
            check_stop(self.stop, self.trainer)
        self._metrics.take()
        self._restore(state)
        self._enforcer.begin()
        if self.lr_controller is not None:
            check_adaptable(self._enforcer.optimizer, "lr_target")
        self._run.callback(self.model.watch())
        self._rescaled = rescales_gradients(self._enforcer.optimizer)
        if (anchor_limit := self.limits.anchor_max_kl) is not None and target_of(
            self.trainer.callback_handler.callbacks
        ) is None:
            logger.warning(blocked_at_the_anchor(anchor_limit, CONTROLLER))
        self._run.enter_context(self._before_save.added())
        if (report := report_of(callbacks)) is not None:
            self._run.callback(report.take_records())
        self._training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rates.close()
        self._end_windows(state.global_step)
        self._write(args, state, control)
        self.leave()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state, control)
        unpack_4bit_weights(kwargs["model"])  # an evaluation may have packed them
        if self._sharding.steps_in_backward:
            self._rates.close()  # of a step that another callback ended early
            self._prepare_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._after_pass()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._after_pass()
        windows = self._windows
        for window in windows:
            if not window.old:
                with self._enforcer.measuring([window]), self._enforcer.before_step():
                    self._fix_old_policy(window)
        if not self._sharding.steps_in_backward:
            self._prepare_step()
        if any(window.stopped for window in windows):
            self.trainer.optimizer.zero_grad()
        share_time(windows)
        for window in windows:
            window.begin_step(lr=self._rate, lr_factor=self._factor)

    def _prepare_step(self) -> None:
        """Before the optimizer's step: set its learning rate, and keep the state if that of the window's start is not enough.

        Where accelerate makes the step in the backward pass, this is before the passes of the step.
        """
        if self.shared_steps or (self._sharding.steps_in_backward and not self._windows):
            self._enforcer.take_snapshot()
        optimizer = self.trainer.optimizer
        self._factor = 1.0 if self.lr_controller is None else self._lr_state.coef
        self._rate = optimizer.param_groups[0]["lr"]
        if self._factor != 1.0:
            self._rates.enter_context(scaled_learning_rate(optimizer, None, self._factor))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rates.close()
        ended = [window for window in self._windows if window.ends_at <= generation.passes(self.trainer)]
        if self.every_step or ended:
            self._enforcer.enforce(self._windows if self.every_step else ended)
        self._held = self.every_step  # the limits, on windows that have not ended
        if self.stop is not None:
            for window in self._windows:
                if window not in ended and not window.stopped:
                    found = enforced(window)[1] if self.every_step else self._enforcer.measure(window)
                    window.stopped = not found.kl <= self.stop
        self._end(ended, update=state.global_step + 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs: dict[str, Any], **_: Any
    ) -> None:
        if self._training:
            if "train_runtime" in logs:  # the last log, before `load_best_model_at_end` loads other weights
                self._end_windows(state.global_step)
            self._write(args, state, control, grad_norm=logs.get("grad_norm"))

    def after_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """End the windows that are left if the run ends; otherwise see `before_save`."""
        if control.should_training_stop:
            self._end_windows(state.global_step)
        self.before_save(args, control)
        if not control.should_log:
            self._write(args, state, control)

    def before_save(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Enforce the limits on windows that have not ended if the model may be saved now."""
        windows = [window for window in self._windows if window.steps]
        if windows and self._enforcer.limited and not self._held and may_save(args, control):
            self._enforcer.enforce(windows)
            self._held = True

    # -- a window ------------------------------------------------------------------------------------------------------

    def _after_pass(self) -> None:
        """Keep what the training pass that was just made shows: a new generation batch, its metrics, its hidden states."""
        if not self._training:
            raise ConfigError(
                "This TrustRegionCallback was added after training began, in the middle of a window; add it before train()."
            )
        trainer = self.trainer
        if trainer._buffered_inputs is not self._batch:
            self._batch = trainer._buffered_inputs
            if not self._windows and not self.shared_steps and not self._sharding.steps_in_backward:
                self._enforcer.take_snapshot()
            self._windows.append(
                Window(
                    self.model, self.processes, generation.micro_batches(trainer),
                    ends_at=generation.end_of_generation(trainer), coef=trainer.beta,
                    completions=generation.completions(trainer) if self.processes.is_main else [],
                    scores=generation.scores(trainer),
                )
            )  # fmt: skip
        window = self._windows[-1]
        window.add_pass(self._metrics.take())
        index = generation.current_micro_batch(trainer)
        states = self.model.states_of_training(window.micro_batches[index])
        if self._may_reuse and states is not None and not window.steps:
            window.states[index] = states

    def _fix_old_policy(self, window: Window) -> None:
        window.fix_old_policy()
        if not self._checked:
            self._check_start(window)
        if self.reference is not None:
            estimator = ESTIMATORS[trl_logs.ESTIMATOR[self.kind]]
            window.measure_anchor(self.reference, estimator, keep=self.limits.anchor_max_kl is not None)

    def _check_start(self, window: Window) -> None:
        """Check that KL(π_old‖π_old) is 0. If it is not with the states of training's passes, they are not used."""
        found = window.measure()
        if found.kl_max != 0.0 and self._may_reuse:
            self._may_reuse = False
            window.fix_old_policy()
            found = window.measure()
        self._checked = found.tokens > 0
        if (reason := not_repeatable(found.kl, self.model.causal)) is not None:
            raise ModelError(reason)

    def _end_windows(self, update: int) -> None:
        """End the windows that are left when the run ends."""
        windows = [window for window in self._windows if window.steps]
        if windows:
            if not self.every_step:
                self._enforcer.enforce(windows)
            self._end(windows, update=update)

    def _end(self, windows: Sequence[Window], *, update: int) -> None:
        """Log the windows, which were enforced, and pass their KL to the controller of the learning rate."""
        metrics = self.trainer._metrics["train"]
        for window in windows:
            window.release()
            if (reason := enforced(window)[0].rejected) is not None:
                logger.warning(f"update {update} is rejected: {reason.rstrip('.')}; the parameters were restored.")
            for name, value in tracked(self._record(window, update)).items():
                metrics[name].append(value)
            self._closed.append((window, update))
        self._windows = [window for window in self._windows if window not in windows]
        if not self._windows:
            self._enforcer.drop_snapshot()
        found = [enforcement for enforcement, measured in map(enforced, windows) if measured.tokens]
        kls = [each.kl_proposed for each in found if math.isfinite(each.kl_proposed)]
        if self.lr_controller is not None and kls:
            episodes = len(windows) * self.trainer.args.generation_batch_size
            self._lr_state = self.lr_controller.update(self._lr_state, kl=max(0.0, *kls), episodes=episodes)
            self._store()

    def _record(self, window: Window, update: int, grad_norm: float | None = None) -> BoundRecord:
        known, target = grad_norm if window.steps == 1 else None, target_of(self.trainer.callback_handler.callbacks)
        return window_record(
            self.kind, self.trainer.args, window, update=update, target=target, rescaled=self._rescaled, grad_norm=known,
            anchor_limit=self.limits.anchor_max_kl,
        )  # fmt: skip

    def _write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, grad_norm: float | None = None
    ) -> None:
        """Pass the records of the windows that ended to the callbacks."""
        closed, self._closed = self._closed, []
        for window, update in closed:
            record = self._record(window, update, grad_norm)
            self._recorder.write(record, completion_rows(window, update), args=args, state=state, control=control)

    def _restore(self, state: TrainerState) -> None:
        """Restore the state of a checkpoint; a run that does not resume has that of its start."""
        if self.lr_controller is None:
            return
        # A state that was loaded may lack the entry that saving expects.
        entry = state.stateful_callbacks.setdefault(TrustRegionState.__name__, TrustRegionState().state())
        self._lr_state = self.lr_controller.init()._replace(coef=entry["attributes"]["lr_factor"])
        self._store()

    def _store(self) -> None:
        """Store the factor of the learning rate for checkpoints."""
        if (stored := state_of(self.trainer.callback_handler.callbacks)) is not None:
            stored.lr_factor = self._lr_state.coef
