"""What is measured of a batch, pooled over the processes: a mixin of the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..advantages import anchor_part, anchor_share, explained_variance, gae
from ..divergences import k3
from ..masking import masked_mean, masked_sum
from ..rollout import transformers_engine as generation
from ..trust_region import measurement
from ..types import AnchorMeasurement, Batch, Measurement, RolloutSummary, Scored


class Measuring:
    """See the module. The trainer that mixes it in has the models, and `_pooled`."""

    def _measure(self, batch: Batch, indices: Iterable[int]) -> Measurement:
        """Measure some of the micro-batches (all of them, for a guarantee) under the policy as it is now."""
        scored = batch.scored
        mask = torch.zeros_like(scored.rollout.response_mask)
        columns = {name: torch.zeros_like(scored.logp) for name in ("logp", "old_kl", "old_tv")}
        for index in indices:
            micro = scored.micro_batches[index]
            out = self._forward_only(micro, values=False, old=scored.old_peers[index])
            length = micro.response_ids.shape[1]
            mask[micro.rows, :length] = micro.response_mask
            for name, column in columns.items():
                column[micro.rows, :length] = getattr(out, name).float()
        mask = self._pooled(mask)
        return measurement(
            self._pooled(columns["old_kl"]),
            self._pooled(columns["old_tv"]),
            self._pooled(columns["logp"] - scored.logp),
            mask,
            complete=bool((mask == self._pooled(scored.rollout.response_mask)).all()),
        )

    def _anchor_share(self, rewards: Tensor, advantages: Tensor, mask: Tensor) -> float:
        part = gae(rewards, torch.zeros_like(rewards), gamma=self.args.gamma, lam=self.args.lam)
        pooled_mask = self._pooled(mask)
        part = anchor_part(part, mask, self._pooled(part), pooled_mask)
        return anchor_share(self._pooled(part), self._pooled(advantages), pooled_mask)

    def _anchor(self, scored: Scored, estimate: Tensor, coef: float, share: float | None) -> AnchorMeasurement:
        mask = self._pooled(scored.rollout.response_mask)
        exact = masked_sum(self._pooled(scored.ref_kl), mask, dim=1).double()
        error = float(exact.std() / math.sqrt(len(exact))) if len(exact) > 1 else math.nan
        sampled = float(masked_sum(self._pooled(estimate), mask, dim=1).double().mean())
        return AnchorMeasurement(coef=coef, kl=sampled, kl_exact=float(exact.mean()), kl_stderr=error, share=share)

    def _summary(self, batch: Batch) -> RolloutSummary:
        scored, rollout = batch.scored, batch.scored.rollout
        mask, scores = self._pooled(rollout.response_mask), self._pooled(scored.scores)
        ended = generation.ends_with_stop(rollout.response_ids, rollout.response_mask, self._stop_ids)
        known = scores[~scores.isnan()]
        sampler_kl = None
        if rollout.sampler_logp is not None:
            sampled = k3(self._pooled(rollout.sampler_logp), self._pooled(scored.logp))
            sampler_kl = float(masked_mean(sampled, mask))
        return RolloutSummary(
            score=float(known.mean()) if len(known) else None,
            length=float(mask.sum(-1).float().mean()),
            eos_rate=float(self._pooled(ended).float().mean()),
            entropy=float(masked_mean(self._pooled(scored.entropy), mask)),
            sampler_kl=sampler_kl,
            explained_variance=explained_variance(
                self._pooled(scored.values), self._pooled(batch.returns), self._pooled(scored.value_mask)
            ),
        )
