"""Scoring a rollout: all that is fixed before the first optimizer step of an update."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from ..advantages import value_positions
from ..policy.forward import ForwardPass
from ..policy.micro_batches import longest_first, micro_batch
from ..policy.reference import Reference
from ..rollout.prompts import prompt_texts
from ..rollout.rewards import as_completion
from ..rollout.sampling import ends_with_stop
from ..rollout.scorer import Scorer
from ..run import rng
from ..run.failure_handling import FailureHandling
from ..types import MicroBatch, PolicySnapshot, Rollout, Scored, UpdateContext
from .config import TrustKLPPOConfig

_TOKEN_COLUMNS = ("logp", "ref_logp", "ref_kl", "entropy")


class Scoring:
    """Log-probabilities under π_old and π_ref, values and scores of a rollout.

    The micro-batches and their trimming are fixed here, and used again when optimising and measuring: then ratio = 1 and
    KL = 0 bit for bit before the first step, in bf16 too.

    Args:
        args: the configuration.
        forward: passes of policy and value.
        reference: π_ref.
        scorer: the reward functions.
        failures: what all processes do about a reward function that fails.
        tokenizer: the policy's.
        stop_ids: the tokens that end a response.
        micro_batch_size: rows of a micro-batch.
        process: the index of this process.
    """

    def __init__(
        self,
        args: TrustKLPPOConfig,
        *,
        forward: ForwardPass,
        reference: Reference,
        scorer: Scorer,
        failures: FailureHandling,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        micro_batch_size: int,
        process: int,
    ) -> None:
        self._args = args
        self._forward = forward
        self._reference = reference
        self._scorer = scorer
        self._failures = failures
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._micro_batch_size = micro_batch_size
        self._process = process

    def score(self, rollout: Rollout, context: UpdateContext, state: TrainerState) -> Scored:
        """The rollout with everything that is fixed before the first step; `state` goes to the reward functions."""
        rollout = rollout._replace(context=context)
        micros = self._micro_batches(rollout, context.update)
        shape = rollout.response_mask.shape
        columns = {name: rollout.response_mask.new_zeros(shape, dtype=torch.float32) for name in _TOKEN_COLUMNS}
        values = rollout.response_mask.new_zeros((shape[0], shape[1] + 1), dtype=torch.float32)
        head = self._forward.model.split_lm.frozen_head()
        old_snapshots, ref_snapshots = [], []
        for micro in micros:
            with self._forward.autocast():
                snapshot = self._reference.snapshot(micro)
            out = self._forward.score(micro, snapshot)
            old_snapshots.append(PolicySnapshot(out.hidden, head))
            ref_snapshots.append(snapshot)
            for name, column in columns.items():
                column[micro.rows, : micro.response_ids.shape[1]] = getattr(out, name).float()
            values[micro.rows, : out.values.shape[1]] = out.values.float()
        completions, scores = self._scores(rollout, context, state)
        mask = rollout.response_mask & ~scores.isnan().unsqueeze(-1)
        value_mask = value_positions(mask, self._args.score_position)
        return Scored(
            rollout=rollout,
            micro_batches=micros,
            old_snapshots=old_snapshots,
            values=torch.where(value_mask, values[:, : shape[1]], 0.0),
            loss_mask=mask,
            value_mask=value_mask,
            scores=scores,
            completions=completions,
            ref_snapshots=ref_snapshots if self._args.anchor_in_loss and self._args.exact_anchor else None,
            **columns,
        )

    def _micro_batches(self, rollout: Rollout, update: int) -> list[MicroBatch]:
        """Micro-batches that divide a mini-batch evenly, each trimmed to its longest row.

        Where every pass takes all rows, rows of like length come together and less is padding; the sums are the same. Where
        it takes some of them, a mini-batch or a fraction that is measured, these are drawn: rows in a seeded order.
        """
        if self._args.num_mini_batches == 1 and self._args.measure_fraction == 1:
            order = longest_first(rollout)
        else:
            generator = rng.generator(self._args.seed, rng.RngStream.MICRO_BATCHES, update, self._process)
            order = torch.randperm(len(rollout.response_ids), generator=generator)
        return [
            micro_batch(rollout, rows) for rows in order.to(rollout.response_ids.device).split(self._micro_batch_size)
        ]

    def _scores(self, rollout: Rollout, context: UpdateContext, state: TrainerState) -> tuple[list[str], Tensor]:
        """Completions as text, and the score of each, NaN where no function gave one; `missing_eos_penalty` taken off."""
        ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        completions = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = prompt_texts(rollout, self._tokenizer)
        found = self._failures.score(
            context,
            lambda: self._scorer(
                rollout,
                prompts=prompts,
                completions=[as_completion(text, prompt) for text, prompt in zip(completions, prompts, strict=True)],
                completion_ids=ids,
                state=state,
            ),
        )
        none = rollout.response_mask.new_full((len(ids),), torch.nan, dtype=torch.float32)
        scores = torch.where(rollout.response_mask.any(-1), none if found is None else found.total, torch.nan)
        if self._args.missing_eos_penalty is not None:
            ended = ends_with_stop(rollout.response_ids, rollout.response_mask, self._stop_ids)
            scores = torch.where(ended, scores, scores - self._args.missing_eos_penalty)
        return completions, scores
