"""One seed gives one run: everything random follows the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.watched import run, watched, without_seconds
from tests.weights import trained_weights

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_same_seed_gives_the_same_records_and_another_seed_others(tmp_path):
    def go(name: str, seed: int, noise: int) -> list[dict[str, Any]]:
        def judge(prompts, completions):
            torch.manual_seed(noise)  # other random numbers of the program: no result depends on them
            return tiny.good_words(prompts, completions)

        torch.manual_seed(noise)
        return without_seconds(run(tmp_path / name, changes={"seed": seed}, reward_funcs=judge)[1])

    assert go("one", 3, noise=1) == go("again", 3, noise=2) != go("other", 4, noise=1)


def test_every_update_and_every_row_samples_different_responses(tmp_path):
    changes = {"learning_rate": 0.0, "max_steps": 2}
    trainer, _ = run(tmp_path, changes=changes, train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}))
    first, second = (rollout.response_ids.tolist() for rollout in trainer.seen["rollout"])
    assert first != second and len(set(map(tuple, first))) > 4


@pytest.mark.parametrize("which", ["responses", "order of prompts", "mini-batches", "adapter"])
def test_everything_random_follows_the_seed(tmp_path, which):
    def go(seed: int) -> Any:
        trainer = watched(tmp_path / str(seed), changes={"seed": seed, "max_steps": 1})
        adapter = trained_weights(trainer.model)
        trainer.train()
        rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
        return {
            "responses": rollout.response_ids.tolist(),
            "order of prompts": [row["prompt"] for row in rollout.rows],
            "mini-batches": [micro.rows.tolist() for micro in scored.micro_batches],
            "adapter": [weight.tolist() for weight in adapter.values()],
        }[which]

    assert go(1) == go(1) != go(2)
