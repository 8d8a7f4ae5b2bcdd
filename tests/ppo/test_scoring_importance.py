"""Runs whose responses another engine samples: the weights, the record, log-probabilities that are missing or not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.ppo.test_recording import RECORD
from tests.tiny import EOS
from tests.watched import Watched, watched, without_seconds
from tests.weights import WatchWeights, same
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError
from trl_trustkl.importance import importance_weights
from trl_trustkl.rollout.engine import Samples

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = [EOS, 5, 6, 7, 8, 9]
"""What the engine samples uniformly."""
NOT_FINITE = "the sampler's log-probabilities are not finite"


class Elsewhere:
    """Samples from a distribution that is not the policy's, and returns its log-probabilities, if `logps`.

    bad: by the number of the call of `generate`, from 0, what the first log-probability of its last response is instead.
    """

    def __init__(self, *, logps: bool = True, bad: dict[int, float] | None = None) -> None:
        self.logps, self.bad, self.calls = logps, bad or {}, 0

    def check(self) -> None: ...
    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None: ...
    def close(self) -> None: ...

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        draw = torch.Generator().manual_seed(seeds[0])
        ids = []
        for _ in prompt_ids:
            row = torch.tensor(TOKENS)[torch.randint(len(TOKENS), (6,), generator=draw)]
            ends = (row == EOS).nonzero()
            ids.append(row[: int(ends[0]) + 1] if len(ends) else row)
        logps = [torch.full((len(row),), -math.log(len(TOKENS))) for row in ids]
        logps[-1][0] = self.bad.get(self.calls, logps[-1][0])
        self.calls += 1
        reasons = ["stop" if EOS in row else "length" for row in ids]
        return Samples(ids, logps if self.logps else None, reasons)


def elsewhere(
    folder: Any, engine: Elsewhere, *, corrects: bool = True, changes: dict[str, Any] | None = None, **arguments: Any
) -> Watched:
    """A trainer whose responses the engine samples, and whose loss is corrected for that."""
    trainer = watched(folder, changes={"stop_token": "eos"} | (changes or {}), **arguments)
    trainer.parts.rollouts.engine = engine
    trainer.parts.scoring.corrects = corrects
    return trainer


def trained(
    folder: Any, engine: Elsewhere, **arguments: Any
) -> tuple[Watched, list[dict[str, Any]], dict[str, Tensor]]:
    """A trainer after its run, its records, and the weights at the end."""
    watch = WatchWeights()
    trainer = elsewhere(folder, engine, callbacks=[watch], **arguments)
    trainer.train()
    return trainer, load_records(folder), watch.snapshots[-1]


FIELDS = [
    {},
    {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.1},
    {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 1e-4},
    {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.2},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_weights_are_those_of_the_fields_and_the_record_describes_the_ratios(tmp_path, fields):
    trainer, records, _ = trained(tmp_path, Elsewhere(), changes={"max_steps": 2, **fields})
    for scored, record in zip(trainer.seen["score"], records, strict=True):
        mask, ratio = scored.rollout.response_mask, scored.logp.double().exp() * len(TOKENS)
        assert not mask.all() and not scored.sampler_weights.requires_grad
        wanted = importance_weights(
            scored.logp, torch.full_like(scored.logp, -math.log(len(TOKENS))), mask,
            fields.get("vllm_importance_sampling_mode", "token_truncate"),
            low=fields.get("vllm_importance_sampling_clip_min"), high=fields.get("vllm_importance_sampling_clip_max", 3.0),
        )  # fmt: skip
        torch.testing.assert_close(scored.sampler_weights, wanted.weights)
        share = wanted.truncated[mask].double().mean().item()
        assert (share > 0.05) == bool(fields), "the bounds were not reached"
        assert record["sampler"] == {
            "kl": pytest.approx((ratio - 1 - ratio.log())[mask].mean().item(), rel=1e-5),
            "ratio_min": pytest.approx(ratio[mask].min().item(), rel=1e-5),
            "ratio_max": pytest.approx(ratio[mask].max().item(), rel=1e-5),
            "truncated": pytest.approx(share, abs=1e-6),
        }
        assert record["refused"] is None and record["trust"]["kl"] > 0


def test_without_correction_an_update_does_not_depend_on_the_log_probabilities(tmp_path):
    _, with_logps, one = trained(tmp_path / "one", Elsewhere(), corrects=False)
    _, without, other = trained(tmp_path / "other", Elsewhere(logps=False), corrects=False)
    assert same(one, other)
    for record, bare in zip(without_seconds(with_logps), without_seconds(without), strict=True):
        assert record.pop("sampler")["truncated"] is None and set(bare.pop("sampler").values()) == {None}
        assert record == bare
    _, _, corrected = trained(tmp_path / "corrected", Elsewhere())
    assert not same(one, corrected), "the correction has no effect"


def test_the_limit_holds_whatever_sampled(tmp_path):
    changes = {"trust_max_kl": 1e-3, "learning_rate": 5e-2, "whiten_advantages": True}
    _, records, _ = trained(tmp_path, Elsewhere(), changes=changes)
    for record in records:
        assert record["sampler"]["kl"] > 0.5
        assert record["trust"]["kl_proposed"] > 1e-3 >= record["trust"]["kl"] and record["trust"]["guaranteed"] == 1e-3


def test_the_trainers_engine_has_weights_of_1(tmp_path):
    trainer = watched(tmp_path, changes={"max_steps": 1})
    trainer.parts.scoring.corrects = True
    trainer.train()
    (scored,), (record,) = trainer.seen["score"], load_records(tmp_path)
    torch.testing.assert_close(scored.sampler_weights, torch.ones_like(scored.logp), rtol=0, atol=1e-4)
    assert record["sampler"]["truncated"] == 0.0
    assert record["sampler"]["ratio_min"] == pytest.approx(1, abs=1e-4) == record["sampler"]["ratio_max"]


def test_a_rerun_without_a_mechanism_has_the_weights_of_the_update(tmp_path):
    """In one step the clip does nothing, so that the update without it is the same."""
    changes = {"attribution_every": 1, "num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0.3}
    _, records, _ = trained(tmp_path, Elsewhere(), changes=changes)
    for record in records:
        assert record["counterfactual"]["clip"] == record["trust"]["kl"] > 0
        assert record["trust"]["gated"] == 0.0
    assert any(record["counterfactual"]["anchor"] != record["trust"]["kl"] for record in records)


# -- log-probabilities that are missing or not finite --------------------------------------------------------------------


def test_an_engine_without_log_probabilities_is_named_with_the_field(tmp_path):
    trainer = elsewhere(tmp_path, Elsewhere(logps=False), eval_dataset=tiny.prompts(2))
    assert math.isfinite(trainer.evaluate()["eval_score"]), "an evaluation corrects nothing"
    with pytest.raises(ConfigError) as error:
        trainer.train()
    for piece in ("`vllm_importance_sampling_correction` got True", "returned no log-probabilities", "=False"):
        assert piece in str(error.value)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_log_probabilities_that_are_not_finite_reject_the_update_and_the_run_continues(tmp_path, caplog, bad, corrects):
    watch = WatchWeights()
    trainer = elsewhere(tmp_path, Elsewhere(bad={1: bad}), corrects=corrects, callbacks=[watch])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = load_records(tmp_path)
    assert [record["refused"] for record in found] == [None, NOT_FINITE, None]
    assert [stats.steps for stats in trainer.seen["optimise"]][1] == 0
    assert same(*watch.snapshots[1:3]) and not same(*watch.snapshots[2:4])
    for group, keys in (RECORD | {"shares": ""}).items():
        assert sorted((found[1][group] or {}) if group else found[1]) == sorted(keys.split()), group
    assert found[1]["sampler"]["kl"] is None and found[1]["trust"]["kl"] == 0.0
    assert found[1]["score"] is not None and found[1]["length"] > 1
    said = [record.getMessage() for record in caplog.records if "is rejected" in record.getMessage()]
    assert len(said) == 1 and f"update 2 is rejected: {NOT_FINITE}" in said[0]


def test_the_log_probabilities_of_padding_do_not_count(tmp_path):
    trainer = elsewhere(tmp_path, Elsewhere())
    trainer._loop.begin()
    rollout = trainer.rollout(trainer.next_prompts())
    clean = trainer.score(rollout)
    padding = ~rollout.response_mask
    assert padding.any()
    found = trainer.score(rollout._replace(sampler_logp=rollout.sampler_logp.masked_fill(padding, math.nan)))
    assert found.sampler_finite and clean.sampler_finite
    assert torch.equal(found.sampler_weights, clean.sampler_weights)
    assert not trainer.score(rollout._replace(sampler_logp=rollout.sampler_logp * math.nan)).sampler_finite


def test_an_evaluation_with_log_probabilities_that_are_not_finite_is_an_evaluation(tmp_path):
    good, bad = (
        elsewhere(tmp_path / name, Elsewhere(bad=bad), eval_dataset=tiny.prompts(4))
        for name, bad in (("good", {}), ("bad", {0: math.nan, 1: math.nan}))
    )
    one, other = good.evaluate(), bad.evaluate()
    assert one.pop("eval_runtime") > 0 and other.pop("eval_runtime") > 0
    assert one == other and not math.isnan(one["eval_score"])
