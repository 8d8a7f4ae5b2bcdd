"""TrustKLPPOTrainer: PPO on TRL with every mechanism of the anchor and the trust region as a switch.

One update is rollout → score → advantages → optimise → measure → enforce → attribute → record. Each phase is a method that
gets what the phases before it returned, so that each can be overridden separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..callbacks.bound_report import BoundReportCallback, is_report, report_of, with_report
from ..callbacks.completions import shown_completions
from ..errors import DataError
from ..policy.loading import gathered_weights, save_policy, trainable
from ..policy.quantization import ready_to_train
from ..policy.value_head import PolicyAndValue
from ..records import BoundRecord
from ..report import model_card
from ..rollout.engine import RolloutEngine
from ..rollout.prompts import AnyDataset, collate_nothing
from ..rollout.rewards import RewardFunc, RewardModel
from ..run.failure_handling import raised_on_all, reject
from ..run.state import OnlineTrainerState
from ..trl_compat.version import PPOTrainer
from ..trust.measurement import measure
from ..types import Batch, Measurement, Prompts, Rollout, Scored, UpdateContext, UpdateStats
from . import contexts, models, recording
from .config import TrustKLPPOConfig
from .evaluation import chosen_dataset, one_dataset
from .inherited import PromptLoader, not_available, prompt_loader, reject_trial
from .loop import TrainingLoop
from .optimise import separate_value
from .parts import Parts
from .shaping import shaped
from .training_fields import OPTIMIZER, SCHEDULE, rejected_by_transformers


class TrustKLPPOTrainer(PPOTrainer):
    """PPO with an anchor to a reference and a trust region around the old policy, and a record of what bounded each update.

    Args:
        args: the configuration; `TrustKLPPOConfig("trainer_output")` when None.
        processing_class: the policy's tokenizer; loaded with the model when `model` is a name.
        model: the policy: a causal language model (4-bit, with an adapter) or the name of one.
        peft_config: a configuration of PEFT, such as LoraConfig(...), whose new adapter is added to `model`.
        ref_model: the reference; None: the policy with its new adapter off, a frozen clone of the adapter that the model
            came with, or, in full fine-tuning, a frozen copy of the model.
        reward_model: one reward model, as TRL's argument; it reads the policy's token ids.
        train_dataset: columns `prompt` (text or messages) or `input_ids`; all columns are passed to the reward functions.
            An IterableDataset is read in a shuffled order, from its start again when it ends, and needs `max_steps`.
        value_model: a sequence classifier with one label, full or PEFT; None: a linear head on the policy's hidden states.
        data_collator: as in TRL; makes `input_ids` (and `attention_mask`) from dataset rows.
        eval_dataset: the dataset for `evaluate()`, or a dict of datasets.
        optimizers: optimizer and scheduler, in place of those that `args` describe.
        callbacks: further callbacks; a `BoundReportCallback` among them replaces the trainer's.
        reward_funcs: a callable `f(prompts, completions, **columns) -> list[float | None]` (async too), a reward model, the
            name of one, or a list of them, weighted by `args.reward_weights`.
        reward_processing_classes: the tokenizers of reward models, in the order of `reward_funcs`. Without one, a model given
            by name gets the tokenizer of that name, and a loaded model reads the policy's token ids.
        rollout_engine: an engine that samples the responses; None: transformers, or vLLM with `args.use_vllm`.

    Raises ConfigError, DataError or ModelError, which name the field, the value, what is valid and the likely fix.
    """

    args: TrustKLPPOConfig
    model: PolicyAndValue
    state: OnlineTrainerState
    is_peft_model = property(lambda self: isinstance(self.model.policy, PeftModel))
    reward_funcs = property(lambda self: self.parts.scorer.funcs)
    reward_weights = property(lambda self: self.parts.scorer.weights)
    # The names of TRL 1.12:
    policy_model = property(lambda self: self.model.policy)
    value_model = property(lambda self: self.model.value_model)
    ref_model = property(lambda self: self.reference.model)
    reward_model = property(lambda self: next((f.model for f in self.reward_funcs if isinstance(f, RewardModel)), None))

    def __init__(
        self,
        args: TrustKLPPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | nn.Module | None = None,
        reward_model: nn.Module | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        value_model: str | nn.Module | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        reward_processing_classes: Any = None,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        args = TrustKLPPOConfig("trainer_output") if args is None else args
        ready = models.prepare(
            args, model=model, tokenizer=processing_class, ref_model=ref_model, value_model=value_model,
            peft_config=peft_config, reward_model=reward_model, reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes, train=train_dataset, evaluation=eval_dataset,
            tags=self._tag_names,
        )  # fmt: skip
        self.reference = ready.reference
        # The constructor of TRL's PPO trainer would build other models and another loop; this one calls its base's.
        super(PPOTrainer, self).__init__(
            model=ready.trained, args=args, data_collator=data_collator or collate_nothing, train_dataset=ready.train,
            eval_dataset=ready.evaluation, processing_class=ready.tokenizer,
            callbacks=[*with_report(callbacks), *shown_completions(args)],
            optimizers=optimizers,
        )  # fmt: skip
        self.state = OnlineTrainerState()
        self.parts = Parts(
            args, ready, self.accelerator, optimizers=(self.optimizer, self.lr_scheduler), data_collator=data_collator,
            callbacks=lambda: self.callback_handler.callbacks, score_held_out=self._score_held_out, engine=rollout_engine,
        )  # fmt: skip
        self._loop = TrainingLoop(self)
        if self.parts.sharding.sharded:  # an evaluation before train() needs the shards too
            self._wrap()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Run the updates; returns transformers' TrainOutput.

        `resume_from_checkpoint` is a path, or True for the last complete checkpoint in `output_dir`; the run continues as if
        it had never stopped. SIGTERM and Ctrl-C end the run after the current update (abandoned after `grace_seconds`), with
        a checkpoint and `Interrupted`, a SystemExit of 128 + the signal; a second signal ends it immediately.

        Raises:
            CheckpointError, ConfigError: the checkpoint is not complete, or was saved under other settings.
            RewardError, DataError: a reward function failed, or a row of a stream; the last finished update is saved.
            RolloutError: the rollout engine failed; the last finished update is saved.
            RefusedError: `max_refused` updates in a row were rolled back; the state before them is saved.
            SaveError: a checkpoint or a record could not be written; the last complete checkpoint is kept.
        """
        reject_trial(trial)
        self.is_in_train = True
        output = self._loop.run(resume_from_checkpoint)
        self.is_in_train = False
        return output

    # -- the phases ----------------------------------------------------------------------------------------------------

    def next_prompts(self) -> Prompts:
        """This process's prompts for the next update."""
        rows, local = self.parts.order.rows(self.state.global_step), self.parts.sizes.local
        mine = rows[self.parts.processes.index * local :][:local]
        with raised_on_all(self.parts.processes, DataError):
            dataset = self.parts.models.stream or self.train_dataset
            prompts = self.parts.collate([dataset[row] for row in mine])
        return prompts

    def rollout(self, prompts: Prompts) -> Rollout:
        """Sample a response to each prompt from the policy."""
        return self.parts.rollouts.sample(prompts, prompts.context or self.new_context())

    def score(self, rollout: Rollout) -> Scored:
        """Compute log-probabilities under π_old and π_ref, values and rewards: all that is fixed before the first step."""
        return self.parts.scoring.score(rollout, rollout.context or self.new_context(), self.state)

    def advantages(self, scored: Scored) -> Batch:
        """Turn the anchor and the score into rewards, and these into advantages."""
        kl_coef = 0.0 if scored.without == "anchor" else self.kl_coef
        return shaped(scored, self.args, self.parts.processes, kl_coef=kl_coef, trust_coef=self.trust_coef)

    def optimise(self, batch: Batch) -> UpdateStats:
        """Run the PPO epochs on this batch; an update with a step that is not finite is rejected and rolled back. Takes the
        snapshot that `enforce` rolls back or scales back to, so an override must call `super().optimise`."""
        without = batch.scored.without
        limit = None if without == "stop" else self.args.trust_stop

        def too_far(mini: Sequence[int]) -> bool:
            self.parts.failures.give_up_if_overdue()
            return limit is not None and not self._measure(batch, mini).kl <= limit

        lr_factor = 1.0 if without == "lr" else self.parts.coefficients.lr_factor
        self.parts.rollouts.weights_changed()
        return self.parts.optimisation.update(batch, too_far, lr_factor=lr_factor)

    def measure(self, batch: Batch) -> Measurement:
        """Measure the batch under the new policy: exact KL(π_old‖π), total variation and ratios, and KL(π‖π_ref) where
        `anchor_max_kl` limits it."""
        count = len(batch.scored.micro_batches)
        return self._measure(batch, range(math.ceil(self.args.measure_fraction * count)))

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        """Enforce the hard limits by backtracking; roll back an update that is not finite, or exceeds `panic_kl`."""
        context = batch.context
        found = self.parts.trust_region.enforce(
            context.taken_snapshot(), lambda: self.measure(batch), proposed, rejected=context.rejected
        )
        if found.rejected is not None and found.rejected != context.rejected:
            reject(context, found.rejected)
        context.enforcement = found
        self.parts.rollouts.weights_changed()
        return found.measured or proposed

    def attribute(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> dict[str, float | None]:
        """Rerun the update without each mechanism in turn, then put the update back bit for bit.

        Returns by mechanism the KL(π_old‖π) in nats per token that the update would have had after enforcement, the other
        mechanisms being on; None for a mechanism that is off. `measured` is the update as it was.
        """
        return self.parts.attribution.counterfactual(batch, stats, measured, self._kl_of_rerun)

    def _kl_of_rerun(self, batch: Batch, without: str) -> float:
        """Make the update again, from its start, without a mechanism."""
        context = replace(batch.context, without=without, rejected=None, enforcement=None)
        scored = batch.scored._replace(rollout=batch.scored.rollout._replace(context=context))
        again = self.advantages(scored) if without == "anchor" else batch._replace(scored=scored)
        self.optimise(again)
        if context.rejected is not None:
            return math.nan
        proposed = self.measure(again)
        measured = self.enforce(again, proposed)
        return measured.kl if context.rejected is None else proposed.kl

    @property
    def dataloader(self) -> PromptLoader:
        """The training prompts, by the batch of one process; TRL's name. The run draws its batches from `next_prompts`."""
        stream = self.parts.models.stream
        rows = self.train_dataset if stream is None else self.train_dataset.map(stream.prepare, with_indices=True)
        return prompt_loader(rows, self.parts.collate, self.parts.sizes.local, drop_last=True)

    @property
    def eval_dataloader(self) -> PromptLoader:
        """The prompts of the evaluation set; TRL's name."""
        return self.get_eval_dataloader()

    def get_train_dataloader(self) -> PromptLoader:
        """`dataloader`."""
        return self.dataloader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PromptLoader:
        """The prompts of a dataset, or of the evaluation set, by `per_device_eval_batch_size`."""
        dataset = self.parts.evaluator.tokenized(one_dataset(eval_dataset, self.eval_dataset))
        return prompt_loader(dataset, self.parts.collate, self.args.per_device_eval_batch_size)

    get_test_dataloader = get_eval_dataloader
    predict = not_available("predict")
    evaluation_loop = not_available("evaluation_loop")
    prediction_step = not_available("prediction_step")
    compute_loss = not_available("compute_loss")
    training_step = not_available("training_step")
    call_model_init = not_available("call_model_init")
    hyperparameter_search = not_available("hyperparameter_search")

    def null_ref_context(self) -> AbstractContextManager[None]:
        """Within it the policy computes as the reference, unless the reference is a separate model; TRL's name."""
        return self.reference.active()

    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> BoundRecord:
        """The record of what bounded this update: gated, measured and guaranteed."""
        rate = self._get_learning_rate()
        return recording.record(self.args, batch, stats, measured, self.parts, self.state.episode, rate)

    @property
    def kl_coef(self) -> float:
        """The anchor's current coefficient; with kl_controller="fixed", the current value of `args.kl_coef`."""
        return self.parts.coefficients.kl

    @property
    def trust_coef(self) -> float:
        """The current coefficient λ of the penalty on KL(π_old‖π)."""
        return self.parts.coefficients.trust

    def _measure(self, batch: Batch, indices: Iterable[int]) -> Measurement:
        """Measure some of the micro-batches under the current policy; a guarantee needs all of them."""
        scored, anchored = batch.scored, self.args.anchor_max_kl is not None
        return measure(
            self.parts.forward.compare, scored.micro_batches, scored.old_snapshots, scored.rollout.response_mask,
            ref=scored.ref_snapshots if anchored else None, anchor_start=batch.anchor.kl_exact,
            gather=self.parts.processes.gather, indices=indices,
        )  # fmt: skip

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample a response to every prompt of the evaluation set, always with the same random numbers, without an effect on
        those of training. Metrics, each behind `metric_key_prefix`: `score`; `rewards/<name>`, the mean of each reward
        function; `kl`, the exact KL(π‖π_ref) in nats per response; `length` in tokens; `eos_rate`; and what reward functions
        log with `log_metric`."""
        dataset = chosen_dataset(eval_dataset, self.eval_dataset)
        if isinstance(dataset, dict):
            found = [self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}") for name, each in dataset.items()]
            return {key: value for metrics in found for key, value in metrics.items()}
        metrics = self.parts.evaluator.metrics(dataset, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_completions(self, eval_dataset: Any = None) -> list[dict[str, Any]]:
        """Sample a response to every prompt, and return rows of `prompt`, `completion`, `score` (NaN where no function gave
        one), `kl`, `length`, `eos_rate`, `rewards` by function, and what these log with `log_extra`, from all processes."""
        return self.parts.evaluator.rows(one_dataset(eval_dataset, self.eval_dataset))

    def generate_completions(self, sampling: bool = False) -> None:
        """Print prompts of the evaluation set with completions and scores; only five of them with `sampling`."""
        self.parts.evaluator.show(self.eval_dataset, few=sampling)

    def _score_held_out(self, prompts: Prompts, place: int) -> Scored:
        context = contexts.of_evaluation(self.args, self.state, self.parts.processes, place)
        return self.score(self.rollout(prompts._replace(context=context))._replace(context=context))

    # -- what the loop, transformers and TRL call ----------------------------------------------------------------------

    def new_context(self) -> UpdateContext:
        """The context of the update that begins."""
        return contexts.of_update(self.args, self.state, self.parts.processes, self.parts.sizes.local)

    def event(self, name: str) -> None:
        """Call the callbacks' method for an event, such as "step_end"."""
        self.control = getattr(self.callback_handler, f"on_{name}")(self.args, self.state, self.control)

    def prepare_optimisation(self) -> None:
        """Wrap model and optimizer for the hardware, once; a second train() starts a new schedule."""
        self._wrap()
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        with rejected_by_transformers(SCHEDULE):
            self.create_scheduler(num_training_steps=self.parts.sizes.updates)
        ready_to_train(self.model)
        self.parts.optimisation.prepare(self.model_wrapped, self.optimizer)

    def _wrap(self) -> None:
        if self.model_wrapped is not self.model:
            return
        self.create_optimizer()
        sharding, reference = self.parts.sharding, self.reference
        self.model_wrapped, self.optimizer = sharding.prepare(
            self.accelerator, self.model, self.optimizer, reference.model
        )
        if sharding.sharded:
            self.model.split_lm.adapt_to_shards()
            reference.split_lm.adapt_to_shards()

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """TRL's optimizer, with the value's parameters in separate groups for `value_learning_rate`."""
        if self.optimizer is not None:
            return self.optimizer
        with rejected_by_transformers(OPTIMIZER):
            optimizer = super().create_optimizer(*args)
        separate_value(optimizer, trainable(self.model.value), rate=self.args.value_learning_rate)
        return optimizer

    def add_callback(self, callback: Any) -> None:
        """Add a callback; a BoundReportCallback replaces the present one, or every record would be written twice."""
        if is_report(callback):
            self.remove_callback(BoundReportCallback)
        super().add_callback(callback)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add everything to `state.log_history`, and pass the numbers to the trackers."""
        numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        super().log(numbers, start_time)
        self.state.log_history[-1].update({k: v for k, v in logs.items() if k not in numbers})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save only the policy (an adapter as an adapter), ready for `from_pretrained`."""
        if not self.parts.sharding.sharded:  # TRL 1.12's PPO trainer overrides this for its loop
            super(PPOTrainer, self).save_model(output_dir, _internal_call)
            return
        self._save(output_dir, gathered_weights(self.model.policy, self.parts.sharding))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_policy(self.model.policy, self.processing_class, self.args, folder, state_dict)
            self._describe(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._loop.save_checkpoint()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's card into output_dir, with a section on how far the run may have moved the model."""
        create = super().create_model_card
        if model_card.written(lambda: create(model_name, dataset_name, tags)):
            self._describe(Path(self.args.output_dir))

    def _describe(self, folder: Path) -> None:
        if self.is_world_process_zero():
            report = report_of(self.callback_handler.callbacks)
            update, page = (0, None) if report is None else (self.state.global_step, report.rendered)
            model_card.describe(folder, self.args, update=update, report=page)
