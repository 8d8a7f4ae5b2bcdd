"""The value: a head on the policy's hidden states, or a separate model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests import tiny
from tests.watched import watched
from tests.weights import same, trained_weights
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, ModelError
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.value_head import PolicyAndValue, ValueHead, ValueModel
from trl_trustkl.types import Batch, Scored

pytestmark = pytest.mark.filterwarnings("ignore")


def value_model(kind: str) -> Any:
    model = tiny.scalar_model(tiny.llama())
    return get_peft_model(model, tiny.lora(task_type="SEQ_CLS")) if kind == "peft" else model


def no_advantages(advantages: Any) -> Any:
    """The advantage phase with advantages of 0, so that only the value has something to learn."""

    def phase(scored: Scored) -> Batch:
        batch = advantages(scored)
        return batch._replace(advantages=torch.zeros_like(batch.advantages))

    return phase


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_a_separate_value_model_learns_and_leaves_the_policy_unchanged(tmp_path, kind):
    value = value_model(kind)
    before = trained_weights(value)
    trainer = watched(tmp_path, value_model=value, changes={"vf_coef": 1.0, "learning_rate": 1e-2})
    policy = trained_weights(trainer.model.policy)
    trainer.advantages = no_advantages(trainer.advantages)
    trainer.train()
    assert not same(before, trained_weights(value)) and same(policy, trained_weights(trainer.model.policy))
    frozen = [n for n, p in value.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (kind == "peft")


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_value_loss_moves_the_policy_only_where_the_head_is_attached(tmp_path, detach, peft):
    changes = {"detach_value_head": detach, "vf_coef": 10.0, "learning_rate": 1e-2, "kl_coef": 0.0}
    trainer = watched(tmp_path, changes=changes, peft_config=tiny.lora() if peft else None)
    policy, value = trained_weights(trainer.model.policy), trained_weights(trainer.model.value)
    trainer.advantages = no_advantages(trainer.advantages)
    trainer.train()
    assert same(policy, trained_weights(trainer.model.policy)) == detach
    assert not same(value, trained_weights(trainer.model.value))
    assert (load_records(tmp_path)[2]["trust"]["kl"] == 0.0) == detach


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_without_a_value_none_is_built_trained_saved_or_recorded(tmp_path, estimator, peft):
    changes = {"advantage_estimator": estimator, "num_generations": 2, "save_strategy": "steps", "attribution_every": 1}
    trainer = watched(tmp_path, changes=changes | {"save_steps": 1}, peft_config=tiny.lora() if peft else None)
    trainer.train()
    assert trainer.value_model is None and not list(trainer.model.value.parameters())
    assert {id(p) for p in trainable(trainer.model)} == {id(p) for p in trainable(trainer.model.policy)}
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(trainable(trainer.model.policy))
    assert not trainer.model.restorable_value and not trainer.model.value_trains_policy
    assert not list(tmp_path.glob("**/value*")) and (tmp_path / "checkpoint-3" / "policy.safetensors").exists() == peft
    scored = trainer.seen["score"][0]
    assert not scored.values.any() and not scored.value_mask.any()
    for record in load_records(tmp_path):
        assert record["value"] == {"clip": None, "gated": None, "explained_variance": None}
        assert record["counterfactual"]["value_clip"] is None and record["refused"] is None
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert len(logs) == 3 and all(log["loss/value_avg"] is log["val/clipfrac_avg"] is None for log in logs)
    assert all(log["advantage/groups"] == 4 and log["val/ratio"] > 0 for log in logs)


def test_a_value_model_without_gae_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="`value_model` got LlamaForSeq.*advantage_estimator='rloo'.*leave it None"):
        tiny.trainer(
            tmp_path, value_model=value_model("full"), changes={"advantage_estimator": "rloo", "num_generations": 2}
        )


def test_a_value_head_starts_at_0_and_computes_in_float32():
    head, hidden = ValueHead(8), torch.randn(2, 3, 8)
    assert not head(hidden).any()
    nn.init.normal_(head.linear.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden.bfloat16())
    assert found.dtype == torch.float32 and found.shape == (2, 3)
    wanted = head.linear(hidden.bfloat16().float()).squeeze(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (lambda: None, "everything"),
        (lambda: value_model("peft"), "the adapter"),
        (lambda: value_model("full"), "nothing"),
    ],
)
def test_a_rejected_update_restores_a_head_or_an_adapter_and_not_a_model_that_is_trained_in_full(value, part):
    model = PolicyAndValue(tiny.llama(), value(), temperature=1.0)
    restored, trained = model.restorable_value, trainable(model.value)
    assert len(restored) == (0 if part == "nothing" else len(trained)) and trained
    assert all(a is b for a, b in zip(restored, trained, strict=False))


def test_a_value_model_of_several_labels_is_rejected():
    model = tiny.scalar_model(tiny.llama())
    model.score = nn.Linear(32, 2, bias=False)
    value = ValueModel(model, tiny.VOCAB)
    ids = torch.arange(1, 5).unsqueeze(0)
    with pytest.raises(ModelError, match="returns 2 numbers per position; it must return 1"):
        value({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1)


def test_a_pad_token_without_an_embedding_is_read_as_masked():
    """The values of the other tokens are those of a text without it."""
    model = tiny.scalar_model(tiny.llama()).train()
    ids = torch.tensor([[5, 6, 7, tiny.VOCAB, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6)[None]}
    values = ValueModel(model, tiny.VOCAB + 1, tiny.VOCAB)(inputs, 0)
    known = ids != tiny.VOCAB
    expected = model.score(model.model(input_ids=ids[known][None]).last_hidden_state).flatten()
    torch.testing.assert_close(values[known], expected)
    assert values.isfinite().all() and inputs["attention_mask"].all(), "the policy reads the same tokens"
    with pytest.raises(ModelError, match="43 embeddings, fewer than the 44 tokens"):
        ValueModel(model, tiny.VOCAB + 1, None)
    with pytest.raises(ModelError, match="43 embeddings, fewer than the 45 tokens"):
        ValueModel(model, tiny.VOCAB + 2, tiny.VOCAB)
