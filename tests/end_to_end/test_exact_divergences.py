"""Exact divergences of a run, against a dense float64 computation from the models' logits."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.dense import dense_kl, dense_logps


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "4-bit"])
def test_exact_divergences_equal_a_dense_float64_computation(family, tmp_path):
    model = tiny.four_bit(tmp_path) if family == "4-bit" else tiny.FAMILIES[family]()
    changes = {"temperature": 0.7, "learning_rate": 0.05}
    trainer = tiny.trainer(tmp_path / "run", model, changes=changes)
    assert trainer.model.split_lm.chunked
    trainer._loop.begin()
    seen = []
    for update in range(2):
        scored = trainer.score(trainer.rollout(trainer.next_prompts()))
        policy = trainer.model.policy
        old = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        with policy.disable_adapter():
            reference = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        for micro, p, q in zip(scored.micro_batches, old, reference, strict=True):
            mine = scored.ref_kl[micro.rows, : micro.response_ids.shape[1]]
            torch.testing.assert_close(mine.double(), dense_kl(p, q) * micro.response_mask, atol=1e-5, rtol=0)
            entropy = scored.entropy[micro.rows, : micro.response_ids.shape[1]]
            torch.testing.assert_close(
                entropy.double(), -(p.exp() * p).sum(-1) * micro.response_mask, atol=1e-5, rtol=0
            )
        batch = trainer.advantages(scored)
        trainer.optimise(batch)
        measured = trainer.measure(batch)
        new = [dense_logps(policy, micro, 0.7) for micro in scored.micro_batches]
        masks = [micro.response_mask for micro in scored.micro_batches]
        kls = torch.cat([dense_kl(p, n)[m] for p, n, m in zip(old, new, masks, strict=True)])
        tvs = torch.cat([0.5 * (p.exp() - n.exp()).abs().sum(-1)[m] for p, n, m in zip(old, new, masks, strict=True)])
        log_ratios = torch.cat(
            [
                (n - p).gather(-1, micro.response_ids.unsqueeze(-1)).squeeze(-1)[micro.response_mask]
                for p, n, micro in zip(old, new, scored.micro_batches, strict=True)
            ]
        )
        assert measured.kl == pytest.approx(float(kls.mean()), abs=1e-5)
        assert measured.kl_max == pytest.approx(float(kls.max()), abs=1e-5)
        assert measured.tv == pytest.approx(float(tvs.mean()), abs=1e-5)
        assert measured.max_ratio == pytest.approx(float(log_ratios.max().exp()), rel=1e-4)
        median = float(log_ratios.quantile(0.5).exp())
        assert measured.ratio_quantiles["0.5"] == pytest.approx(median, rel=1e-4)
        seen.append(measured.kl)
        trainer.state.global_step = update + 1
    assert max(seen) > 1e-3, "the policy did not move, so that only zeros were compared"
