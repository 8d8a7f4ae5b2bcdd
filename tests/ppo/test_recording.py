"""The record of an update, the metrics that are logged, and the completions."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.tiny import EOS
from tests.watched import before_the_first_step, run, watched
from trl_trustkl.ppo.recording import summary

pytestmark = pytest.mark.filterwarnings("ignore")
RECORD = {
    "": (
        "update episode score length eos_rate entropy lr refused seconds anchor trust value gradient sampler binding shares "
        "rewards counterfactual trainer advantage rollout"
    ),
    "seconds": "sync generate score optimise measure total",
    "anchor": "estimator placement gradient coef target kl kl_exact kl_stderr kl_per_token target_per_token renewed share "
    "limit kl_after guaranteed",
    "trust": (
        "rule low high gated gated_low gated_high coef epochs stopped kl kl_max kl_response_max kl_proposed tv "
        "max_ratio ratio_quantiles scale tries limit guaranteed "
        "limit_token limit_response guaranteed_token guaranteed_response decided certificate "
        "mask_limit masked masked_responses"
    ),
    "value": "clip gated explained_variance",
    "gradient": "norm max_norm scale",
    "sampler": "kl ratio_min ratio_max truncated",
    "rollout": "engine",
    "shares": "anchor clip response_mask penalty stop backtrack grad_norm lr",
}
"""The keys of a record, by group."""
CERTIFICATE = "gain stderr bound difference smallest kl_needed"
BINDING = {"anchor", "clip", "response_mask", "penalty", "stop", "backtrack", "grad_norm", "lr", "none"}


def test_a_record_has_exactly_the_keys_of_the_design(tmp_path):
    _, records = run(tmp_path)
    assert len(records) == 3
    for record in records:
        for group, keys in RECORD.items():
            assert sorted(record[group] if group else record) == sorted(keys.split()), group
        assert list(record["trust"]["certificate"]) == CERTIFICATE.split()


def test_a_record_without_a_value_has_the_same_keys_and_those_of_the_groups(tmp_path):
    _, records = run(tmp_path, changes={"advantage_estimator": "grpo", "num_generations": 4})
    for record in records:
        for group, keys in (RECORD | {"advantage": "estimator num_generations groups groups_without_signal"}).items():
            assert sorted(record[group] if group else record) == sorted(keys.split()), group


def test_a_record_holds_what_it_says(tmp_path):
    changes = {"kl_controller": "adaptive", "kl_target": 3.0, "cliprange": 0.1, "cliprange_high": 0.3}
    trainer, records = run(tmp_path, changes=changes)
    assert [record["update"] for record in records] == [1, 2, 3]
    assert [record["episode"] for record in records] == [8, 16, 24]
    rates = [1e-3 * left / 3 for left in (3, 2, 1)]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    for record, scored in zip(records, trainer.seen["score"], strict=True):
        anchor, trust = record["anchor"], record["trust"]
        assert (anchor["estimator"], anchor["placement"], anchor["gradient"]) == ("k1", "reward", "exact")
        assert anchor["target"] == 3.0
        exact = torch.where(scored.loss_mask, scored.ref_kl, 0.0).sum(1)
        assert anchor["kl_exact"] == pytest.approx(float(exact.mean()), abs=1e-6)
        assert anchor["kl_stderr"] == pytest.approx(float(exact.std()) / math.sqrt(8), abs=1e-6)
        k1 = torch.where(scored.loss_mask, scored.logp - scored.ref_logp, 0.0).sum(1)
        assert anchor["kl"] == pytest.approx(float(k1.mean()), abs=1e-6)
        assert (trust["rule"], trust["low"], trust["high"], trust["coef"]) == ("ppo", 0.1, 0.3, 0.0)
        assert (trust["scale"], trust["tries"], trust["limit"], trust["guaranteed"]) == (None, 0, None, None)
        assert trust["gated"] == pytest.approx(trust["gated_low"] + trust["gated_high"])
        assert record["score"] == pytest.approx(float(scored.scores.mean()))
        assert record["binding"] in BINDING and record["refused"] is None
        assert record["shares"]["clip"] == trust["gated"] and record["shares"]["anchor"] == anchor["share"]
        assert record["value"]["clip"] == 0.2 and record["sampler"]["kl"] < 1e-9
        ratios = (scored.logp - scored.rollout.sampler_logp)[scored.rollout.response_mask].double().exp()
        assert record["sampler"]["ratio_min"] == pytest.approx(float(ratios.min()), abs=1e-12)
        assert record["sampler"]["ratio_max"] == pytest.approx(float(ratios.max()), abs=1e-12)
        assert (
            record["sampler"]["ratio_min"] < record["sampler"]["ratio_max"] and record["sampler"]["truncated"] is None
        )


def test_a_batch_without_a_sampled_token_has_no_ratio(tmp_path):
    trainer = watched(tmp_path)
    batch = before_the_first_step(trainer)
    assert summary(batch, trainer.parts).sampler_ratio_max == pytest.approx(1, abs=1e-4)
    nothing = torch.zeros_like(batch.scored.rollout.response_mask)
    rollout = batch.scored.rollout._replace(response_mask=nothing)
    scored = batch.scored._replace(rollout=rollout, sampler_truncated=nothing)
    found = summary(batch._replace(scored=scored), trainer.parts)
    assert (found.sampler_kl, found.sampler_ratio_min, found.sampler_ratio_max) == (0.0, None, None)
    assert found.sampler_truncated == 0.0


@pytest.mark.parametrize("changes", [{"panic_kl": 1e-9}, {"measure_fraction": 0.5}])
def test_an_update_that_is_rejected_or_measured_in_part_has_no_certificate(tmp_path, changes):
    _, records = run(tmp_path, changes={"max_steps": 1, "local_rollout_forward_batch_size": 2} | changes)
    assert (records[0]["refused"] is not None) == ("panic_kl" in changes)
    assert records[0]["trust"]["certificate"] is None


def test_the_records_reach_the_logs_under_flat_names(tmp_path):
    trainer, records = run(tmp_path)
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    for record, log in zip(records, logs, strict=True):
        assert log["trust/kl"] == record["trust"]["kl"] and log["anchor/kl_exact"] == record["anchor"]["kl_exact"]
        assert log["binding"] == record["binding"] and log["trust/rule"] == "ppo" and log["trust/scale"] is None
        assert log["objective/kl"] == record["anchor"]["kl"] and log["objective/scores"] == record["score"]
        penalty = -record["anchor"]["coef"] * record["anchor"]["kl"]
        assert log["objective/rlhf_reward"] == pytest.approx(record["score"] + penalty)


def test_eps_is_a_number_of_episodes_per_second_and_every_stop_token_is_counted(tmp_path):
    trainer, records = run(tmp_path)
    for record, log, rollout in zip(records, trainer.state.log_history[:3], trainer.seen["rollout"], strict=True):
        assert isinstance(log["eps"], float) and log["eps"] != int(log["eps"])
        assert log["val/num_eos_tokens"] == int((rollout.response_ids == EOS).sum()) == round(8 * record["eos_rate"])


def test_completions_are_kept_with_their_score_and_their_likelihood_under_the_reference(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 2})
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(
        sorted(row) == ["completion", "prompt", "ref_logp", "rewards", "score", "update"] for row in rows
    )
    assert [row["update"] for row in rows] == [1] * 8 + [2] * 8
    scored, rollout = trainer.seen["score"][1], trainer.seen["rollout"][1]
    assert [row["prompt"] for row in rows[8:]] == [row["prompt"] for row in rollout.rows]
    assert [row["completion"] for row in rows[8:]] == scored.completions
    assert [row["score"] for row in rows[8:]] == scored.scores.tolist()
    assert [row["rewards"]["good_words"] for row in rows[8:]] == scored.rewards["good_words"].tolist()
    likelihood = torch.where(rollout.response_mask, scored.ref_logp, 0.0).sum(1)
    assert [row["ref_logp"] for row in rows[8:]] == pytest.approx(likelihood.tolist())
