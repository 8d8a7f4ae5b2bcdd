"""Scoring a rollout: fixed micro-batches, masks, and a ratio of exactly 1 before the first step."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.tiny import EOS, PAD
from tests.watched import CUT, ENDED, run, watched

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_a_step_the_ratio_is_1_and_the_kl_is_0_bit_for_bit(tmp_path, family, bf16, checkpointing):
    changes = {"learning_rate": 0.0, "bf16": bf16, "gradient_checkpointing": checkpointing, "max_steps": 2}
    trainer, records = run(tmp_path, tiny.FAMILIES[family](), changes=changes)
    for record in records:
        trust = record["trust"]
        assert (trust["kl"], trust["kl_max"], trust["kl_proposed"], trust["tv"]) == (0.0, 0.0, 0.0, 0.0)
        assert trust["max_ratio"] == 1.0 and set(trust["ratio_quantiles"].values()) == {1.0}
        assert record["anchor"]["kl"] == record["anchor"]["kl_exact"] == 0.0
    for stats in trainer.seen["optimise"]:
        # In every epoch and mini-batch, not only in the measurement after the update.
        assert (stats.total.ratio, stats.total.ratio_var, stats.total.approx_kl) == (1.0, 0.0, 0.0)
        assert stats.total.gated == stats.total.clip_fraction == 0.0


def test_with_a_step_the_measurement_sees_it(tmp_path):
    _, records = run(tmp_path, changes={"learning_rate": 1e-2})
    for record in records:
        assert record["trust"]["kl_max"] >= record["trust"]["kl"] > 0 and record["trust"]["max_ratio"] > 1.0


@pytest.mark.parametrize(
    ("changes", "by_length"), [({}, True), ({"num_mini_batches": 2}, False), ({"measure_fraction": 0.5}, False)]
)
def test_rows_of_like_length_share_a_micro_batch_where_every_pass_takes_all(tmp_path, changes, by_length):
    trainer = watched(tmp_path, changes={"num_mini_batches": 1, "measure_fraction": 1.0} | changes)
    trainer.train()
    in_order = []
    for scored in trainer.seen["score"]:
        length = scored.rollout.prompt_mask.sum(-1) + scored.rollout.response_mask.sum(-1)
        rows = torch.cat([micro.rows for micro in scored.micro_batches])
        assert sorted(rows.tolist()) == list(range(len(length)))
        in_order.append(length[rows].tolist() == sorted(length.tolist(), reverse=True))
    assert all(in_order) == by_length


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_end_of_a_response_is_trained_where_it_is_the_padding_too(tmp_path, family):
    """With PAD = EOS the end counts, the padding after it does not, and an EOS inside a prompt is read."""
    tokenizer = tiny.tokenizer(pad=False)
    prompts = Dataset.from_dict({"input_ids": [[5, EOS, 9], [9]] * 8})
    logps = {}
    for name, processing in (("same", tokenizer), ("own", tiny.tokenizer())):
        trainer, records = run(
            tmp_path / name, tiny.FAMILIES[family](), processing_class=processing, train_dataset=prompts,
            changes={"max_steps": 1, "stop_token": "eos"}, script=[ENDED, CUT],
        )  # fmt: skip
        scored = trainer.seen["score"][0]
        logps[name] = scored.logp
        assert scored.loss_mask.sum(1).tolist() == [3, 6] * 4
        assert (scored.logp[0, :3] < 0).all() and records[0]["eos_rate"] == 0.5
        assert scored.rollout.prompt_mask.sum(1).tolist() == [len(r["input_ids"]) for r in scored.rollout.rows]
    assert torch.equal(logps["same"], logps["own"])


def test_a_response_that_starts_with_padding_is_a_response(tmp_path):
    trainer, (record,) = run(tmp_path, changes={"max_steps": 1}, script=[([PAD, 7, 8], 6), ([PAD] * 6, 6)])
    assert trainer.seen["score"][0].loss_mask.all() and record["refused"] is None
    logs = trainer.state.log_history[0]
    assert all(math.isfinite(logs[name]) for name in logs if name.startswith(("loss/", "policy/", "val/", "trust/k")))


@pytest.mark.parametrize(("stop", "penalised"), [(EOS, [False, True]), (4, [True, False])])
def test_the_missing_eos_penalty_looks_for_the_stop_token(tmp_path, stop, penalised):
    script = [([5, 7, EOS], 3 if stop == EOS else 6), ([9, 8, 7, 6, 5, 4], 6)]
    changes = {"max_steps": 1, "missing_eos_penalty": 2.0, "stop_token_id": stop}
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=lambda prompts, completions: [5.0] * 8, script=script)
    assert trainer.seen["score"][0].scores[:2].tolist() == [3.0 if missing else 5.0 for missing in penalised]
