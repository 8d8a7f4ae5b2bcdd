"""Scoring a rollout: everything that is fixed before the first optimizer step of an update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TrainerState

from ..advantages import value_positions
from ..errors import ConfigError, ModelError
from ..importance import importance_weights
from ..masking import kept, masked_mean
from ..parallel.processes import Processes
from ..policy.forward import ForwardPass
from ..policy.micro_batches import micro_batches
from ..rollout.prompts import prompt_texts
from ..rollout.rewards import as_completion
from ..rollout.sampling import ended
from ..rollout.scorer import Scorer
from ..run import rng
from ..run.failure_handling import FailureHandling
from ..types import Logged, MicroBatch, PolicySnapshot, Rollout, Scored, UpdateContext
from .config import TrustKLPPOConfig
from .models import Models

LARGEST_KL_AT_THE_START = 0.01
"""In nats per token: rounding in bf16 stays below it, where an adapter is disabled instead of a model copied."""

_TOKEN_COLUMNS = ("logp", "ref_logp", "ref_kl", "entropy")


class _Correction(NamedTuple):
    """The importance weights of the sampled tokens and where a bound changed one, [B, T] each, None where nothing is corrected;
    whether the sampler's log-probabilities of all processes are finite."""

    weights: Tensor | None = None
    truncated: Tensor | None = None
    finite: bool = True


@dataclass
class Scoring:
    """Computes log-probabilities under π_old and π_ref, values, scores and importance weights of a rollout.

    The micro-batches and their trimming are fixed here, and used again when optimising and measuring: then ratio = 1 and
    KL = 0 bit for bit before the first step, in bf16 too. other_sampler: whether something else than the policy's forward
    pass samples. corrects: whether the policy's loss is weighted by the ratio of π_old to the distribution that the responses
    were sampled from.
    """

    args: TrustKLPPOConfig
    models: Models
    processes: Processes
    forward: ForwardPass
    scorer: Scorer
    failures: FailureHandling
    micro_batch_size: int
    corrects: bool = False
    other_sampler: bool = False
    _checked_start: bool = field(default=False, init=False)

    def score(self, rollout: Rollout, context: UpdateContext, state: TrainerState) -> Scored:
        """The scored rollout; `state` is passed to the reward functions. ConfigError where the rollout has no log-probabilities
        to correct by."""
        rollout = rollout._replace(context=context)
        micros = self._micro_batches(rollout, context.update)
        shape = rollout.response_mask.shape
        columns = {name: rollout.response_mask.new_zeros(shape, dtype=torch.float32) for name in _TOKEN_COLUMNS}
        values = rollout.response_mask.new_zeros((shape[0], shape[1] + 1), dtype=torch.float32)
        head = self.forward.frozen_head()
        old_snapshots, ref_snapshots = [], []
        for micro in micros:
            snapshot = self.forward.reference_snapshot(self.models.reference, micro)
            out = self.forward.score(micro, snapshot)
            old_snapshots.append(PolicySnapshot(out.hidden, head))
            ref_snapshots.append(snapshot)
            for name, column in columns.items():
                column[micro.rows, : micro.response_ids.shape[1]] = getattr(out, name).float()
            values[micro.rows, : out.values.shape[1]] = out.values.float()
        if context.training and not self._checked_start:
            self._checked_start = True
            if context.update == 0 and self.models.reference.is_start:
                self._check_start(columns["ref_kl"], rollout.response_mask)
        correction = self._correction(rollout, columns["logp"]) if context.training else _Correction()
        completions, scores, rewards, logged = self._scores(rollout, context, state)
        mask = rollout.response_mask & ~scores.isnan().unsqueeze(-1)
        value_mask = torch.zeros_like(mask)
        if self.args.has_value:
            value_mask = value_positions(mask, self.args.score_position)
        return Scored(
            rollout=rollout,
            micro_batches=micros,
            old_snapshots=old_snapshots,
            values=torch.where(value_mask, values[:, : shape[1]], 0.0),
            loss_mask=mask,
            value_mask=value_mask,
            scores=scores,
            completions=completions,
            rewards=rewards,
            logged=logged,
            ref_snapshots=ref_snapshots if self.args.keeps_reference else None,
            sampler_logp=rollout.sampler_logp if self._masks_by_sampler and context.training else None,
            sampler_weights=correction.weights,
            sampler_truncated=correction.truncated,
            sampler_finite=correction.finite,
            **columns,
        )

    @property
    def _masks_by_sampler(self) -> bool:
        return self.other_sampler and self.args.response_mask_kl is not None

    def _correction(self, rollout: Rollout, old_logp: Tensor) -> _Correction:
        """Of a batch of training, on all processes; `old_logp` as `importance_weights` has it."""
        args, mask, logp = self.args, rollout.response_mask, rollout.sampler_logp
        if logp is None:
            if self._masks_by_sampler:
                raise ConfigError(
                    f"`response_mask_kl` got {args.response_mask_kl}, but the rollout engine returned no log-probabilities of "
                    "the sampled tokens, which response masks need. Let it return them, or set response_mask_kl=None."
                )
            if self.corrects:
                raise ConfigError(
                    "`vllm_importance_sampling_correction` got True, but the rollout engine returned no log-probabilities of "
                    "the sampled tokens. Let it return them, or set vllm_importance_sampling_correction=False."
                )
            return _Correction()
        finite = not self.processes.any(bool((mask & ~logp.isfinite()).any()))
        if not self.corrects:
            return _Correction(finite=finite)
        found = importance_weights(
            old_logp, logp, mask, args.vllm_importance_sampling_mode,
            low=args.vllm_importance_sampling_clip_min, high=args.vllm_importance_sampling_clip_max,
        )  # fmt: skip
        return _Correction(found.weights, found.truncated, finite)

    def _check_start(self, ref_kl: Tensor, mask: Tensor) -> None:
        """Raise ModelError on all processes if the policy is not its reference before the first step."""
        kl = float(masked_mean(ref_kl, mask))
        if self.processes.any(kl > LARGEST_KL_AT_THE_START):  # one that is not finite is a rejected update
            raise ModelError(
                f"before the first step the KL to the reference is {kl:.3g} nats per token; it must be 0, because the "
                "reference is the policy as the trainer got it. Either the policy was changed after the trainer was built, or "
                "`model` or `peft_config` gives different results in each pass. To use another reference, pass it as "
                "`ref_model`."
            )

    def _micro_batches(self, rollout: Rollout, update: int) -> list[MicroBatch]:
        """Micro-batches, each trimmed to its longest row.

        Where every pass takes all rows, rows are sorted by length, which needs less padding and gives the same sums. Where
        a pass takes only some of them (a mini-batch, or the measured fraction), the rows are in a random order instead.
        """
        order = None
        if self.args.num_mini_batches > 1 or self.args.measure_fraction != 1:
            generator = rng.generator(self.args.seed, rng.RngStream.MICRO_BATCHES, update, self.processes.index)
            order = torch.randperm(len(rollout.response_ids), generator=generator)
        return micro_batches(rollout, self.micro_batch_size, order)

    def _scores(
        self, rollout: Rollout, context: UpdateContext, state: TrainerState
    ) -> tuple[list[str], Tensor, dict[str, Tensor], Logged]:
        """The completions as text, their scores less `missing_eos_penalty`, NaN where no function gave a reward, the rewards
        of each function, and what the functions logged."""
        ids = kept(rollout.response_ids, rollout.response_mask)
        texts = self.models.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = prompt_texts(rollout, self.models.tokenizer)
        completions = [as_completion(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        found = self.failures.score(
            context,
            lambda: self.scorer(rollout, prompts=prompts, completions=completions, completion_ids=ids, state=state),
        )
        none = rollout.response_mask.new_full((len(ids),), torch.nan, dtype=torch.float32)
        scores = torch.where(rollout.response_mask.any(-1), none if found is None else found.total, torch.nan)
        if self.args.missing_eos_penalty is not None:
            missing = ~ended(rollout, self.models.stop_ids)
            scores = torch.where(missing, scores - self.args.missing_eos_penalty, scores)
        by_function = {} if found is None else found.by_function
        rewards = {
            name: none.new_tensor([torch.nan if reward is None else reward for reward in each])
            for name, each in by_function.items()
        }
        return texts, scores, rewards, Logged({}, {}) if found is None else found.logged
