"""The trainer's constructor, in the order of TRL's arguments, and a subclass that overrides a phase."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from tests import tiny
from tests.watched import Watched
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.policy.value_head import ValueModel
from trl_trustkl.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")


class CountsSteps(TrainerCallback):
    count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def test_the_constructor_of_trl_works_by_position(tmp_path):
    policy = tiny.llama()
    trainer = Watched(
        tiny.config(tmp_path),
        tiny.tokenizer(),
        policy,
        tiny.llama(),
        tiny.scalar_model(policy, seed=2),
        tiny.id_prompts(),
        tiny.scalar_model(policy, seed=1),
        None,
        tiny.id_prompts(),
        (None, None),
        [steps := CountsSteps()],
        tiny.lora(),
    )
    trainer.train()
    assert steps.count == 3 and len(load_records(tmp_path)) == 3
    assert isinstance(trainer.model.value, ValueModel) and trainer.reference.model is not None
    assert trainer.reward_weights == [1.0] and set(trainer.evaluate()) >= {"eval_score", "eval_kl"}


def test_an_override_of_enforce_need_not_call_the_method_it_overrides(tmp_path):
    class Unenforced(TrustKLPPOTrainer):
        def enforce(self, batch: Batch, proposed: Any) -> Any:
            return proposed

    tiny.trainer(tmp_path, kind=Unenforced, changes={"max_steps": 1, "trust_max_kl": 1e-9}).train()
    (record,) = load_records(tmp_path)
    assert record["trust"]["kl"] == record["trust"]["kl_proposed"] > 1e-9
    assert record["trust"]["scale"] is record["trust"]["limit"] is record["trust"]["guaranteed"] is None
