"""The parts of a trainer, built from its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from tests.tiny import EOS
from trl_trustkl.ppo.parts import Parts
from trl_trustkl.rollout.transformers_engine import TransformersEngine
from trl_trustkl.trust.limits import Limits

pytestmark = pytest.mark.filterwarnings("ignore")


def parts(folder: Any, *, changes: dict[str, Any] | None = None, **arguments: Any) -> tuple[Any, Parts]:
    trainer = tiny.trainer(folder, changes=changes, **arguments)
    return trainer, trainer.parts


def test_sizes_and_order_follow_from_the_batch(tmp_path):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5, "seed": 7}
    _, found = parts(tmp_path, changes=changes)
    assert tuple(found.sizes) == (8, 8, 5, 4)
    assert found.order.batches_per_pass == 2 and len(found.order.rows(0)) == 8
    assert found.order.rows(0) != parts(tmp_path, changes=changes | {"seed": 8})[1].order.rows(0)


def test_the_trust_region_has_the_limits_of_the_configuration(tmp_path):
    changes = {"trust_max_kl": 0.1, "panic_kl": 0.5, "trust_max_kl_token": 0.7, "trust_max_kl_response": 0.9}
    found = parts(tmp_path, changes=changes | {"anchor_max_kl": 2.0})[1].trust_region.limits
    assert found == Limits(max_kl=0.1, panic_kl=0.5, max_kl_token=0.7, max_kl_response=0.9, anchor_max_kl=2.0)
    assert parts(tmp_path)[1].trust_region.limits == Limits(None, None)


def test_the_parts_share_policy_processes_and_stop_tokens(tmp_path):
    trainer, found = parts(tmp_path)
    assert found.forward.model is found.optimisation.policy_and_value is trainer.model
    assert found.optimisation.processes is found.processes
    assert isinstance(found.rollouts.engine, TransformersEngine) and found.models.stop_ids == [EOS]


def test_the_reward_functions_and_the_callbacks_are_those_of_the_trainer(tmp_path):
    def other(prompts: list, completions: list) -> list[float]:
        return [0.0] * len(prompts)

    trainer, found = parts(tmp_path, reward_funcs=[tiny.good_words, other], changes={"reward_weights": [1.0, 2.0]})
    assert found.scorer.funcs == [tiny.good_words, other] == trainer.reward_funcs
    assert found.scorer.weights == [1.0, 2.0] == trainer.reward_weights


def test_an_optimizer_that_is_given_gets_the_values_parameters(tmp_path):
    model = tiny.tuned()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    changes = {"value_learning_rate": 0.3}
    trainer, _ = parts(tmp_path, model=model, peft_config=None, optimizers=(optimizer, None), changes=changes)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert optimizer.param_groups[1]["params"] == list(trainer.model.value.parameters())


def test_evaluation_samples_and_scores_with_the_trainer(tmp_path):
    trainer, found = parts(tmp_path, changes={"per_device_eval_batch_size": 3}, eval_dataset=tiny.prompts(7))
    calls, score = [], trainer.score
    trainer.score = lambda rollout: (calls.append(len(rollout.prompt_ids)), score(rollout))[1]
    rows = found.evaluator.rows(tiny.prompts(7))
    assert len(rows) == 7 and calls == [3, 3, 1]
