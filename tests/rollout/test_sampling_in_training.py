"""Where the responses of a run end."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.watched import run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("settings", "stops"), [({}, False), ({"stop_token": "eos"}, True)])
def test_prompts_of_token_ids_stop_only_if_configured(tmp_path, settings, stops):
    changes = {"max_steps": 2, "response_length": 12} | settings
    trainer, records = run(tmp_path, changes=changes, train_dataset=tiny.id_prompts())
    rollout = trainer.seen["rollout"][0]
    assert [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)] == [
        row["input_ids"] for row in rollout.rows
    ]
    if stops:
        assert min(record["length"] for record in records) < 12 and records[0]["eos_rate"] > 0
    else:
        assert [record["length"] for record in records] == [12, 12]
        assert [record["eos_rate"] for record in records] == [0, 0]


@pytest.mark.parametrize("stop_token_id", [7, 9])
def test_a_custom_stop_token_ends_responses(tmp_path, stop_token_id):
    trainer, records = run(tmp_path, changes={"stop_token_id": stop_token_id, "response_length": 20})
    rollout = trainer.seen["rollout"][0]
    ended = (rollout.response_ids == stop_token_id) & rollout.response_mask
    assert sum(record["eos_rate"] for record in records) > 0
    assert records[0]["eos_rate"] == ended.any(1).float().mean()
    last = rollout.response_mask.sum(1) - 1
    assert (ended.any(1) == (rollout.response_ids[torch.arange(8), last] == stop_token_id)).all()
