"""TrustKLPPOTrainer: PPO on TRL with every mechanism of the anchor and the trust region as a switch. One update is

    rollout → score → advantages → optimise → measure → enforce → record

each a method with a NamedTuple in and a NamedTuple out, to be overridden one at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from .. import bounds
from ..advantages import anchor_rewards, gae, place_scores, value_positions
from ..callbacks.bound_report import with_report
from ..errors import ConfigError, ModelError
from ..masking import masked_moments, weighing_factor, whiten
from ..policy import loading
from ..policy.micro_batches import longest_first, micro_batch, trim_left
from ..policy.reference import build_reference
from ..policy.value_head import PolicyAndValue
from ..rollout import transformers_engine as generation
from ..rollout.prompts import collate_nothing, prepare_datasets, token_limits
from ..rollout.rewards import RewardFunc, build_rewards, token_readers
from ..run import rng
from ..run.failure_handling import Endings
from ..run.rng import RngStream
from ..run.signals import StopRequest
from ..trl_compat.version import PPOTrainer
from ..trust.snapshot import UpdateSnapshot
from ..trust_region import backtrack
from ..types import (
    Batch,
    BoundRecord,
    Enforcement,
    Measurement,
    MicroBatch,
    PolicySnapshot,
    Prompts,
    Rollout,
    Scored,
    UpdateStats,
)
from .cards import Cards
from .config import TrustKLPPOConfig
from .evaluation import Evaluation
from .logs import Logs
from .measuring import Measuring
from .plumbing import Plumbing
from .saving import Saving
from .scoring import Scoring

_TOKEN_COLUMNS = ("logp", "ref_logp", "ref_kl", "entropy")


class TrustKLPPOTrainer(Scoring, Measuring, Endings, Evaluation, Saving, Cards, Logs, Plumbing, PPOTrainer):
    """PPO with an anchor to a reference and a trust region around the old policy, and a record of what bounded each update.

    Args:
        args: the configuration; `TrustKLPPOConfig("trainer_output")` when None.
        processing_class: the policy's tokenizer; loaded with the model when `model` is a name.
        model: the policy: a causal language model, 4-bit and PEFT models included, or the name of one
            (`args.model_init_kwargs` go to `from_pretrained`).
        ref_model: the reference; None: the policy with its new adapter off, a frozen clone of the adapter the model came
            with, or, in full fine-tuning, a frozen copy of the model.
        reward_model: TRL's way to give one reward model; it reads the policy's token ids.
        train_dataset: columns `prompt` (text or messages) or `input_ids`; all columns reach the reward functions.
        value_model: a sequence classifier with one label, full or PEFT; None: a linear head on the policy's hidden states.
        data_collator: TRL's; makes `input_ids` (and `attention_mask`) of dataset rows.
        eval_dataset: for `evaluate()`, or a dict of them.
        optimizers: optimizer and scheduler, in place of those that `args` describe.
        callbacks: further callbacks; a `BoundReportCallback` among them takes the place of the trainer's own.
        peft_config: the policy's adapter.
        reward_funcs: a callable `f(prompts, completions, **columns) -> list[float | None]` (async too), a reward model, the
            name of one, or a list of them, weighted by `args.reward_weights`.
        reward_processing_classes: the tokenizers of reward models that have their own, in the order of `reward_funcs`.

    Raises:
        ConfigError, DataError, ModelError: naming the field, the value, what is valid and the likely fix.
    """

    def __init__(
        self,
        args: TrustKLPPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | nn.Module | None = None,
        reward_model: nn.Module | None = None,
        train_dataset: Dataset | None = None,
        value_model: str | nn.Module | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        reward_processing_classes: Any = None,
    ) -> None:
        args = TrustKLPPOConfig("trainer_output") if args is None else args
        _check_arguments(args, model, ref_model, train_dataset, reward_model, reward_funcs)
        set_seed(args.seed)  # adapters and value heads start from random numbers
        policy, tokenizer = loading.load_policy(model, processing_class, args, peft_config)
        self.is_peft_model = isinstance(policy, PeftModel)
        self.reward_funcs, self.reward_weights = build_rewards(
            reward_funcs if reward_model is None else reward_model,
            reward_processing_classes,
            weights=args.reward_weights,
            init_kwargs=args.model_init_kwargs,
            vocab_size=len(tokenizer),
        )
        value = loading.prepare_value_model(value_model, args)
        trained = PolicyAndValue(policy, value, temperature=args.temperature, detach_value=args.detach_value_head)
        self.reference = build_reference(
            policy,
            trained.split_lm,
            loading.load_causal_lm(ref_model, args.model_init_kwargs) if isinstance(ref_model, str) else ref_model,
            ref_adapter_name=args.ref_adapter_name,
            new_adapter=peft_config is not None,
        )
        others = {"ref_model": self.reference.model, "value_model": value, **token_readers(self.reward_funcs)}
        self._room = token_limits(policy, others)
        train_dataset, eval_dataset = prepare_datasets(train_dataset, eval_dataset, tokenizer, self._room, args)
        self._stop_ids = generation.stop_ids(policy, tokenizer, args, text="prompt" in train_dataset.column_names)
        # TRL's own PPO constructor builds models and loop the way this one replaces; its base's is the one to call.
        super(PPOTrainer, self).__init__(
            model=trained,
            args=args,
            data_collator=data_collator or collate_nothing,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=with_report(callbacks),
            optimizers=optimizers,
        )
        self._setup(data_collator)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Run the updates; returns TRL's TrainOutput.

        `resume_from_checkpoint`: a path, or True for the last whole checkpoint in `output_dir`; the run goes on as if it had
        never stopped. SIGTERM and Ctrl-C end it after the update in hand (given up after `grace_seconds`), with a
        checkpoint and `Interrupted`, a SystemExit of 128 + the signal; a second one ends it at once. The other arguments are
        those of transformers' method, and change nothing.

        Raises:
            CheckpointError, ConfigError: a checkpoint that is not whole, or was saved under other settings.
            RewardError: a reward function that failed; the last finished update is saved.
            RefusedError: `max_refused` updates in a row had to be undone; the state before them is saved.
            SaveError: a checkpoint or a record could not be written; the last whole checkpoint stays.
        """
        with StopRequest(self.args.grace_seconds) as self._stop_request:
            self._begin_training(resume_from_checkpoint)
            while self._goes_on():
                with self._update_in_hand():
                    self._update()
            return self._end_training()

    def _update(self) -> None:
        with self._timed("generate"):
            rollout = self.rollout(self.next_prompts())
        with self._timed("score"):
            scored = self.score(rollout)
            batch = self.advantages(scored)
        with self._timed("optimise"):
            stats = self.optimise(batch)
        with self._timed("measure"):
            proposed = self.measure(batch)
            self.enforcement = Enforcement(proposed.kl, scale=None, tries=0, limit=None)
            measured = self.enforce(batch, proposed)
        self._end_update(batch, stats, self.record(batch, stats, measured))

    # -- the phases ----------------------------------------------------------------------------------------------------

    def next_prompts(self) -> Prompts:
        """This process's prompts of the update that begins."""
        rows = self._order.rows(self.state.global_step)
        local = self.args.local_batch_size
        mine = rows[self.accelerator.process_index * local :][:local]
        return self._collate([self.train_dataset[row] for row in mine])

    def rollout(self, prompts: Prompts) -> Rollout:
        """Sample a response to each prompt from the policy."""
        args, policy = self.args, self.model.policy
        config = generation.generation_config(
            response_length=args.response_length,
            temperature=args.temperature,
            stop_ids=self._stop_ids,
            pad_token_id=self.processing_class.pad_token_id,
            extra=args.generation_kwargs,
        )
        parts = []
        with (
            self.accelerator.autocast(),
            rng.seeded(self.accelerator.device, args.seed, *self._sampling_key, self.accelerator.process_index),
        ):
            for start in range(0, len(prompts.ids), args.local_rollout_forward_batch_size):
                rows = slice(start, start + args.local_rollout_forward_batch_size)
                ids, mask = trim_left(prompts.ids[rows], prompts.mask[rows])
                parts.append(generation.sample_responses(policy, ids, mask, stop_ids=self._stop_ids, config=config))
        responses, masks, logps = zip(*parts, strict=True)
        return Rollout(
            prompts.ids,
            prompts.mask,
            torch.cat(responses),
            torch.cat(masks),
            torch.cat(logps),
            prompts.rows,
        )

    def score(self, rollout: Rollout) -> Scored:
        """Log-probabilities under π_old and π_ref, values and rewards: all that is fixed before the first step.

        The micro-batches and their trimming are fixed here, and used again when optimising and measuring: then ratio = 1
        and KL = 0 bit for bit before the first step, in bf16 too.
        """
        micros = self._micro_batches(rollout)
        shape = rollout.response_mask.shape
        columns = {name: rollout.response_mask.new_zeros(shape, dtype=torch.float32) for name in _TOKEN_COLUMNS}
        values = rollout.response_mask.new_zeros((shape[0], shape[1] + 1), dtype=torch.float32)
        head = self.model.split_lm.frozen_head()
        old_peers, ref_peers = [], []
        for micro in micros:
            with self.accelerator.autocast():
                peer = self.reference.peer(micro)
            out = self._forward_only(micro, entropy=True, ref=peer)
            old_peers.append(PolicySnapshot(out.hidden, head))
            ref_peers.append(peer)
            for name, column in columns.items():
                column[micro.rows, : micro.response_ids.shape[1]] = getattr(out, name).float()
            values[micro.rows, : out.values.shape[1]] = out.values.float()
        completions, scores = self._rewards(rollout)
        mask = rollout.response_mask & ~scores.isnan().unsqueeze(-1)
        value_mask = value_positions(mask, self.args.score_position)
        return Scored(
            rollout=rollout,
            micro_batches=micros,
            old_peers=old_peers,
            values=torch.where(value_mask, values[:, : shape[1]], 0.0),
            loss_mask=mask,
            value_mask=value_mask,
            scores=scores,
            completions=completions,
            ref_peers=ref_peers if self.args.anchor_in_loss and self.args.exact_anchor else None,
            **columns,
        )

    def advantages(self, scored: Scored) -> Batch:
        """The anchor and the score as rewards, and their advantages."""
        args, mask = self.args, scored.loss_mask
        coef = self.kl_coef
        estimator = args.build_kl_estimator()
        divergence = scored.ref_kl if estimator is None else estimator(scored.logp, scored.ref_logp)
        pull = anchor_rewards(divergence, mask, coef if args.anchor_in_reward else 0.0, of_contexts=args.exact_anchor)
        rewards = pull + place_scores(scored.scores, mask, args.score_position)
        scale = 1.0
        if args.whiten_rewards:
            mean, var = masked_moments(self._pooled(rewards), self._pooled(scored.value_mask))
            rewards = whiten(rewards, scored.value_mask, mean=mean, var=var, shift_mean=False)
            scale = weighing_factor(mean, var)
        advantages = gae(rewards, scored.values, gamma=args.gamma, lam=args.lam)
        returns = advantages + scored.values
        share = self._anchor_share(scale * pull, advantages, mask) if args.anchor_in_reward else None
        if args.whiten_advantages:
            mean, var = masked_moments(self._pooled(advantages), self._pooled(mask))
            advantages = whiten(advantages, mask, mean=mean, var=var)
            scale *= weighing_factor(mean, var)
        return Batch(
            scored,
            torch.where(mask, advantages, 0.0),
            returns,
            self._anchor(scored, divergence, coef, share),
            advantage_scale=float(scale),
            trust_coef=self.trust_coef,
            finite=bool(self._pooled(advantages + returns).isfinite().all()),
        )

    def optimise(self, batch: Batch) -> UpdateStats:
        """The PPO epochs on this batch. A step that is not finite is refused, and the update undone with it.

        Keeps the point to which an update is undone or scaled back, so an override calls `super().optimise` for that.
        """
        self._start = UpdateSnapshot(loading.trainable(self.model.policy), self.model.undoable_value, self.optimizer)
        limit = self.args.trust_stop

        def too_far(mini: Sequence[int]) -> bool:
            self._give_up_if_overdue()
            return limit is not None and not self._measure(batch, mini).kl <= limit

        with self._learning_rate_by_kl():
            if self._bad_reward is not None:
                stats = self._optimisation.nothing(self._bad_reward)
            else:
                stats = self._optimisation.run(batch, self._generator(RngStream.MINI_BATCHES), too_far)
        if stats.refused is None and not math.isfinite(stats.total.policy_loss + stats.total.value_loss):
            stats = stats._replace(refused="the loss is not finite")
        if stats.refused is not None:
            self._undo(stats.refused)
        return stats

    def measure(self, batch: Batch) -> Measurement:
        """The same batch under the new policy: exact KL(π_old‖π), total variation and ratios."""
        count = len(batch.scored.micro_batches)
        return self._measure(batch, range(math.ceil(self.args.measure_fraction * count)))

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        """Hold `trust_max_kl` by backtracking; an update that is not finite, or beyond `panic_kl`, is undone instead."""
        limit = self.args.trust_max_kl
        self.enforcement = Enforcement(proposed.kl, scale=None if limit is None else 1.0, tries=0, limit=limit)
        panic = self.args.panic_kl
        reason: str | None = None
        if not math.isfinite(proposed.kl):
            reason = "the KL(π_old‖π) measured after it is not finite"
        elif panic is not None and proposed.kl > panic:
            reason = f"its KL(π_old‖π) of {proposed.kl:.3g} nats per token is above panic_kl = {panic:g}"
        if reason is not None:
            self._undo(reason)
        if self._refused:  # here, or while optimising: nothing of the step is left
            self.enforcement = self.enforcement._replace(scale=None if limit is None else 0.0)
            return proposed if reason is None else self.measure(batch)
        if limit is None or proposed.kl <= limit:
            return proposed
        tried = [proposed]

        def measure() -> float:
            tried.append(self.measure(batch))
            return tried[-1].kl

        found = backtrack(self._start.policy.set_scale, measure, limit, proposed=proposed.kl)
        self.enforcement = self.enforcement._replace(scale=found.scale, tries=found.tries)
        return next((m for m in tried if m.kl == found.measured), None) or self.measure(batch)

    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> BoundRecord:
        """What bounded this update, in the words gated, measured and guaranteed."""
        return bounds.build_record(
            self.args,
            update=self.state.global_step + 1,
            episode=self.state.episode,
            lr=self._get_learning_rate() * self._lr_factor,
            lr_factor=self._lr_factor,
            trust_coef=batch.trust_coef,
            refused=self._refused,
            seconds={**self._seconds, "total": time.perf_counter() - self._update_started},
            rollout=self._summary(batch),
            anchor=batch.anchor,
            stats=stats,
            measured=measured,
            enforcement=self.enforcement,
        )

    # -- what the phases share -----------------------------------------------------------------------------------------

    @property
    def kl_coef(self) -> float:
        """The anchor's coefficient now; with kl_controller="fixed" it is `args.kl_coef`, also when something changes that."""
        return self.args.kl_coef if self.args.kl_controller == "fixed" else self.kl_state.coef

    @property
    def trust_coef(self) -> float:
        """The coefficient λ of the penalty on KL(π_old‖π) now."""
        return self.args.trust_coef if self.args.trust_controller == "fixed" else self.trust_state.coef

    def _micro_batches(self, rollout: Rollout) -> list[MicroBatch]:
        """Micro-batches that divide a mini-batch evenly, each trimmed to its longest row.

        Where every pass takes all rows, rows of like length come together and less is padding; the sums are the same. Where
        it takes some of them, a mini-batch or a fraction that is measured, these are drawn: rows in a seeded order.
        """
        if self.args.num_mini_batches == 1 and self.args.measure_fraction == 1:
            order = longest_first(rollout)
        else:
            order = torch.randperm(len(rollout.response_ids), generator=self._generator(RngStream.MICRO_BATCHES))
        chunks = order.to(rollout.response_ids.device).split(self._micro_size)
        return [micro_batch(rollout, rows) for rows in chunks]


def _check_arguments(
    args: Any, model: Any, ref_model: Any, train_dataset: Any, reward_model: Any, reward_funcs: Any
) -> None:
    """Which arguments of the trainer there have to be, and which exclude each other."""
    if not isinstance(args, TrustKLPPOConfig):
        raise ConfigError(f"`args` got {type(args).__name__}; it must be a TrustKLPPOConfig.")
    if model is None or train_dataset is None:
        raise ConfigError(f"`{'model' if model is None else 'train_dataset'}` got None; it is required.")
    if ref_model is model and not isinstance(model, str):
        raise ModelError("`ref_model` is the model itself; give a copy, or None and the trainer makes the reference.")
    if reward_model is not None and reward_funcs is not None:
        raise ConfigError("`reward_model` and `reward_funcs` were both given; put the model into `reward_funcs`.")
