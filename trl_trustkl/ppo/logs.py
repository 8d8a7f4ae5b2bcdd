"""What a run logs of each update, under our names and TRL's, and the completions it keeps: a mixin of the trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import gather_object

from .. import records
from ..masking import masked_sum
from ..types import Batch, BoundRecord, UpdateStats


class Logs:
    """See the module. The trainer that mixes it in has the state, and `_metrics` of the updates since the last log."""

    def _update_metrics(self, batch: Batch, stats: UpdateStats, record: BoundRecord) -> dict[str, Any]:
        """The record flattened, and TRL's own metric names, with the values they should have had."""
        scored = batch.scored
        mask = self._pooled(scored.rollout.response_mask)
        ends = torch.tensor(self._stop_ids, device=mask.device, dtype=torch.long)
        penalty = -record.anchor.coef * record.anchor.kl
        entropy = masked_sum(-self._pooled(scored.logp), mask, dim=1).mean()
        return {
            **records.flatten(record),
            "eps": (self.state.episode - self._episodes_before) / (time.perf_counter() - self._started),
            "objective/kl": record.anchor.kl,
            "objective/entropy": float(entropy),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + (record.score or 0.0),
            "objective/scores": record.score,
            "policy/approxkl_avg": stats.total.approx_kl,
            "policy/clipfrac_avg": stats.total.clip_fraction,
            "policy/entropy_avg": record.entropy,
            "loss/policy_avg": stats.total.policy_loss,
            "loss/value_avg": stats.total.value_loss,
            "val/clipfrac_avg": stats.total.value_gated,
            "val/ratio": stats.total.ratio,
            "val/ratio_var": stats.total.ratio_var,
            "val/num_eos_tokens": int((torch.isin(self._pooled(scored.rollout.response_ids), ends) & mask).sum()),
        }

    def _flush_metrics(self) -> None:
        """Log the mean of each number since the last log, and the latest of everything else."""
        logs: dict[str, Any] = {}
        for name, values in self._metrics.items():
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            logs[name] = sum(numbers) / len(numbers) if numbers else values[-1]
        logs |= {"update": self.state.global_step, "episode": self.state.episode}
        self._metrics.clear()
        self._logged_step = self.state.global_step
        self.log(logs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Everything goes into `state.log_history`; trackers, which plot, get the numbers."""
        numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        rest = {k: v for k, v in logs.items() if k not in numbers}
        super().log(numbers, start_time)
        self.state.log_history[-1].update(rest)

    def _completion_rows(self, batch: Batch) -> list[dict[str, Any]]:
        """What goes into `completions.jsonl`: prompt, completion, score and the reference's log-likelihood of it, in nats."""
        scored = batch.scored
        likelihood = masked_sum(scored.ref_logp, scored.rollout.response_mask, dim=1).tolist()
        prompts = self._prompt_texts(scored.rollout)
        rows = [
            {"update": self.state.global_step, "prompt": prompt, "completion": text, "score": score, "ref_logp": logp}
            for prompt, text, score, logp in zip(
                prompts, scored.completions, scored.scores.tolist(), likelihood, strict=True
            )
        ]
        return [records.as_dict(row) for row in gather_object(rows)]
