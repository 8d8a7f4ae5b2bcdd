"""AdaptiveKLCallback: a controller of the KL coefficient for TRL's trainers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..controllers import AdaptiveKL, Controller, ControllerState
from ..errors import ConfigError, out_of_range
from ..trl_compat.trl_logs import COEF, KL, KL_METRIC, TARGET, Kind, kind_of, responses_per_step, writes_records
from ..trl_compat.trl_trainers import TRLTrainer

logger = logging.get_logger(__name__)

SMALLEST = 1e-12
"""Used in place of a coefficient of 0, at which GRPO and RLOO stop measuring the KL."""


class AdaptiveKLState(TrainerCallback, ExportableState):
    """Holds the state of an `AdaptiveKLCallback` in checkpoints. An `AdaptiveKLCallback` adds it to its trainer.

    It is a separate callback, because transformers may rebuild such callbacks from the checkpoint, and a checkpoint cannot
    hold the trainer that an `AdaptiveKLCallback` needs.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": self.saved}}


class AdaptiveKLCallback(TrainerCallback):
    """Adapts the KL coefficient of one of TRL's trainers so that its KL to the reference meets a target.

        trainer = GRPOTrainer(..., args=GRPOConfig(..., beta=0.04))
        trainer.add_callback(AdaptiveKLCallback(DualKL(coef=0.04, target=0.05), trainer=trainer))

    It adapts `beta` of `GRPOTrainer` and `RLOOTrainer` (target in nats per token), and `kl_coef` of the PPO trainer of TRL 1.12
    and earlier (target in nats per response). The KL is the estimate of KL(π‖π_ref) that the trainer logs. The run starts with
    the controller's coefficient and ignores the configured one, but `beta` must be above 0, or TRL loads no reference.

    Args:
        controller: an instance of a class of `trl_trustkl.controllers`, such as `DualKL(coef=0.04, target=0.05)`.
        trainer: the trainer that the callback is added to.

    Once per optimizer step (RLOO: per generation; PPO: per update), the controller gets the KL that the trainer measured
    since, as max(0, KL), and returns the coefficient for the next steps. A KL that is not finite changes nothing. TRL
    gathers its metrics from all processes, so all of them use the same coefficient. Logged for each KL: `kl/measured`,
    `kl/target` (if the controller has one) and `kl/coef`, the coefficient at which this KL was measured. The controller's
    state is saved in checkpoints and restored when a run resumes.

    Raises ConfigError for an object that is not a controller, and for a trainer without such a coefficient, without a
    reference (β = 0), or with the coefficient built into its loss (Liger's GRPO loss).
    """

    def __init__(self, controller: Controller, trainer: Any) -> None:
        self.controller = controller
        self.state: Any = _first_state(controller)
        self.trainer: TRLTrainer = trainer
        self.kind = _checked_kind(trainer)
        self.step = 0  # of the last KL, from which episodes are counted
        self._values: list[float] = []
        self._read = 0
        if self._store() is None:
            trainer.add_callback(AdaptiveKLState())

    @property
    def coef(self) -> float:
        """The current coefficient."""
        return self.trainer.args.kl_coef if self.kind == "ppo" else self.trainer.beta

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        own: object = self.trainer.args
        if args is not own:
            raise ConfigError("`trainer` is not the trainer that this AdaptiveKLCallback was added to; give that one.")
        if sum(isinstance(each, AdaptiveKLCallback) for each in callbacks) > 1:
            raise ConfigError("The trainer got two AdaptiveKLCallbacks; both would set its coefficient. Add one.")
        # A state that was loaded, or made before this callback was added, may lack the entry that saving expects.
        self._restore(state.stateful_callbacks.setdefault(AdaptiveKLState.__name__, AdaptiveKLState().state()), state)
        self._apply()
        self._check_horizon(state.max_steps)
        if self.kind == "ppo":
            # To the front, because `on_log` has to add its values before the trackers read the logs.
            callbacks.remove(self)
            callbacks.insert(0, self)

    def _check_horizon(self, steps: int) -> None:
        controller: object = self.controller
        if not isinstance(controller, AdaptiveKL):
            return
        responses = responses_per_step(self.trainer.args)
        if controller.largest_change(responses) >= 1:
            clip, shortest = controller.clip, controller.clip * responses
            valid = f"above {shortest:g}, clip × responses of a step = {clip:g} × {responses:g}"
            raise out_of_range("horizon", controller.horizon, valid)
        if (warning := controller.horizon_warning(responses, steps)) is not None:
            logger.warning(f"AdaptiveKLCallback: {warning}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.kind == "ppo":
            return
        metrics = self.trainer._metrics["train"]
        values = self._unread(metrics.get(KL_METRIC[self.kind], []))
        if values:
            for name, value in self._move(sum(values) / len(values), state.global_step).items():
                metrics[name].append(value)
        elif not self._values:
            raise ConfigError(
                f"`trainer` got a {type(self.trainer).__name__}, which measured no {KL_METRIC[self.kind]!r} in its first "
                "step: there is nothing to control. Remove the callback, or let the trainer log its KL to the reference."
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.kind != "ppo" or KL_METRIC["ppo"] not in logs:
            return
        added = self._move(logs[KL_METRIC["ppo"]], state.global_step)
        logs.update(added)
        state.log_history[-1].update(added)

    def _unread(self, values: list[float]) -> list[float]:
        """The values of the last step. TRL appends to the list until it logs, and then creates a new one."""
        if not values:  # a step with RLOO's last generation, right after a log
            return values
        start = self._read if values is self._values else 0
        self._values, self._read = values, len(values)
        return values[start:]

    def _move(self, kl: float, step: int) -> dict[str, float]:
        """Pass a KL to the controller; returns what is to be logged."""
        logged = {KL: kl, COEF: self.coef}
        target = getattr(self.controller, "target", None)
        if target is not None:
            logged[TARGET] = float(target)
        if math.isfinite(kl):
            each = responses_per_step(self.trainer.args)
            episodes = math.floor(step * each) - math.floor(self.step * each)
            self.state = self.controller.update(self.state, kl=max(0.0, kl), episodes=episodes)
            self.step = step
            self._apply()
        else:
            logger.warning(f"The KL to the reference was {kl} in step {step}; the coefficient stays at {self.coef:g}.")
        return logged

    def _apply(self) -> None:
        coef = self.state.coef
        if not 0 <= coef < math.inf:
            raise ConfigError(f"`controller` returned a coefficient of {coef!r}; it must be finite, 0 or above.")
        if self.kind == "ppo":
            self.trainer.args.kl_coef = coef
        else:
            self.trainer.beta = max(coef, SMALLEST)
        if (store := self._store()) is not None:
            store.saved = {
                "controller": type(self.controller).__name__,
                "state": self.state._asdict(),
                "step": self.step,
            }

    def _store(self) -> AdaptiveKLState | None:
        callbacks = self.trainer.callback_handler.callbacks
        return next((each for each in callbacks if isinstance(each, AdaptiveKLState)), None)

    def _restore(self, entry: dict[str, Any], state: TrainerState) -> None:
        """Restore the state of a checkpoint; it is empty in a run that does not resume."""
        saved = entry["attributes"]["saved"]
        self.step = min(saved.get("step", 0), state.global_step)
        if not saved:
            return
        own = type(self.controller).__name__
        if saved["controller"] != own:
            logger.warning(
                f"The checkpoint was written with the controller {saved['controller']}, and this run has {own}; "
                f"training continues with the initial coefficient of {own}, {self.state.coef:g}."
            )
            return
        self.state = type(self.state)(**saved["state"])


def _first_state(controller: Any) -> ControllerState:
    advice = "give an instance of one of trl_trustkl.controllers, such as AdaptiveKL(coef=0.05, target=0.1)"
    if isinstance(controller, type) or not all(
        callable(getattr(controller, name, None)) for name in ("init", "update")
    ):
        raise ConfigError(f"`controller` got {controller!r}, which has no init() and update(): {advice}.")
    state = controller.init()
    if not hasattr(state, "coef") or not hasattr(state, "_asdict"):
        raise ConfigError(
            f"`controller` has the first state {state!r}; it must be a NamedTuple with a field `coef`: {advice}."
        )
    return state


def _checked_kind(trainer: Any) -> Kind:
    """The trainer's kind. ConfigError if its coefficient cannot be changed."""
    name, args = type(trainer).__name__, getattr(trainer, "args", None)
    if writes_records(args):
        raise ConfigError(
            f"`trainer` got a {name}, which needs no AdaptiveKLCallback. Set kl_controller='adaptive' (or another), "
            "kl_target and kl_coef in its TrustKLPPOConfig instead."
        )
    kind = kind_of(args)
    if kind is None:
        raise ConfigError(
            f"`trainer` got a {name}, which has no KL coefficient that could be changed; it must be a GRPOTrainer, an "
            "RLOOTrainer or the PPOTrainer of TRL 1.12 or before."
        )
    if kind == "ppo":
        return kind
    if trainer.beta == 0:
        raise ConfigError(
            f"`beta` got {trainer.beta!r}; it must be above 0: at 0, {name} loads no reference and measures no KL. Give a "
            "small positive one, such as beta=0.001; the controller's coefficient replaces it when training begins."
        )
    if hasattr(trainer, "liger_loss"):
        raise ConfigError(
            "`use_liger_kernel` got True; it must be False: Liger's GRPO loss has `beta` built in, so that it cannot be "
            "changed during the run."
        )
    return kind


def target_of(callbacks: Iterable[Any]) -> float | None:
    """The target of the controller among the callbacks, in its unit; None without one."""
    controllers = [each.controller for each in callbacks if isinstance(each, AdaptiveKLCallback)]
    return getattr(controllers[0], "target", None) if controllers else None
