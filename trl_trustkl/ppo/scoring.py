"""The text of prompts and responses, and the scores that the reward functions give them: a mixin of the trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rollout import transformers_engine as generation
from ..rollout.rewards import as_completion, compute_scores
from ..types import Rollout


class Scoring:
    """See the module. The trainer that mixes it in has the reward functions, and `_failing_together`."""

    def _rewards(self, rollout: Rollout) -> tuple[list[str], Tensor]:
        """Completions as text, and the score of each, NaN where no function gave one; `missing_eos_penalty` taken off."""
        tokenizer = self.processing_class
        ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = self._prompt_texts(rollout)
        with self._failing_together() as failed:
            scores = compute_scores(
                self.reward_funcs,
                self.reward_weights,
                rollout,
                prompts=prompts,
                completions=[as_completion(text, prompt) for text, prompt in zip(completions, prompts, strict=True)],
                completion_ids=ids,
                state=self.state,
                batch_size=self.args.per_device_train_batch_size,
                retries=self.args.reward_retries,
                wait=self._stop_request.wait,
            )
        if failed:
            scores = rollout.response_mask.new_full((len(ids),), math.nan, dtype=torch.float32)
        scores = torch.where(rollout.response_mask.any(-1), scores, math.nan)
        if self.args.missing_eos_penalty is not None:
            ended = generation.ends_with_stop(rollout.response_ids, rollout.response_mask, self._stop_ids)
            scores = torch.where(ended, scores, scores - self.args.missing_eos_penalty)
        return completions, scores

    def _prompt_texts(self, rollout: Rollout) -> list[Any]:
        """The prompts as the dataset has them; decoded where it has token ids only."""
        if rollout.rows and "prompt" in rollout.rows[0]:
            return [row["prompt"] for row in rollout.rows]
        ids = [row[mask] for row, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        return self.processing_class.batch_decode(ids, skip_special_tokens=True)
