"""The thin trainers: TRL's, with the callbacks that the configuration describes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import tiny
from tests.weights import same, trained_weights
from trl_trustkl import (
    AdaptiveKLCallback,
    BoundReportCallback,
    TrustKLGRPOConfig,
    TrustKLGRPOTrainer,
    TrustKLRLOOConfig,
    TrustKLRLOOTrainer,
    TrustRegionCallback,
    load_records,
)
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.trust.limits import Limits

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "grpo": (TrustKLGRPOTrainer, TrustKLGRPOConfig, GRPOTrainer, GRPOConfig),
    "rloo": (TrustKLRLOOTrainer, TrustKLRLOOConfig, RLOOTrainer, RLOOConfig),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def built(trainer: Any, config: Any, folder: Any, callbacks: Any = None, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        **tiny.GROUPS,
        "max_steps": 3,
        "learning_rate": 5e-2,
        "beta": 0.1,
    }
    return trainer(
        tiny.llama(), tiny.good_words, config(**settings | changes), tiny.prompts(), None, tiny.tokenizer(),
        callbacks=callbacks, peft_config=tiny.lora(),
    )  # fmt: skip


def ours(kind: str, folder: Any, **changes: Any) -> Any:
    trainer, config, _, _ = KINDS[kind]
    return built(trainer, config, folder, **changes)


def added(trainer: Any, kind: type) -> Any:
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, kind)]
    assert len(found) <= 1
    return found[0] if found else None


@EACH
def test_without_a_field_training_is_trls_bit_for_bit(kind, tmp_path):
    _, _, trainer, config = KINDS[kind]
    first = ours(kind, tmp_path / "ours", callbacks=[BoundReportCallback(report=False)])
    first.train()
    second = built(trainer, config, tmp_path / "trl")  # it seeds the generation of its run
    second.train()
    assert same(trained_weights(first.model), trained_weights(second.model))
    assert added(first, AdaptiveKLCallback) is None
    records = load_records(tmp_path / "ours")
    assert len(records) == 3 and all(record["trust"]["kl"] > 0 for record in records)
    assert all(record["trust"]["limit"] is None for record in records)


@EACH
def test_every_limit_reaches_the_callback(kind, tmp_path):
    limits = {"trust_max_kl": 0.1, "trust_max_kl_token": 0.2, "trust_max_kl_response": 0.3, "anchor_max_kl": 0.4}
    found = added(ours(kind, tmp_path, panic_kl=0.5, **limits), TrustRegionCallback).limits
    assert found == Limits(max_kl=0.1, panic_kl=0.5, max_kl_token=0.2, max_kl_response=0.3, anchor_max_kl=0.4)


@EACH
def test_the_fields_reach_the_callbacks(kind, tmp_path):
    fields = {"kl_controller": "dual", "kl_target": 0.02, "kl_controller_kwargs": {"lr": 0.3}, "trust_max_kl": 0.01}
    report = BoundReportCallback(report=False)
    trainer = ours(kind, tmp_path, callbacks=[report], panic_kl=1e3, trust_lr_target=0.005, **fields)
    assert added(trainer, BoundReportCallback) is report
    assert added(trainer, TrustRegionCallback) is not None
    trainer.train()
    records = load_records(tmp_path)
    assert len(records) == 3
    assert [record["anchor"]["target_per_token"] for record in records] == [0.02] * 3
    assert all(record["trust"]["limit"] == 0.01 and record["trust"]["kl"] <= 0.01 for record in records)
    assert records[0]["anchor"]["coef"] == 0.1 and records[1]["anchor"]["coef"] != 0.1
    assert records[0]["lr"] == 0.05 and records[1]["lr"] < 0.05 * 2 / 3  # the schedule's rate, divided by 1.5


@EACH
def test_another_configuration_is_an_error(kind, tmp_path):
    trainer, config, _, plain = KINDS[kind]
    with pytest.raises(ConfigError, match=f"`args` got a {plain.__name__}; it must be a {config.__name__}"):
        built(trainer, plain, tmp_path)


@EACH
def test_a_limit_that_the_steps_make_useless_is_an_error(kind, tmp_path):
    with pytest.raises(ConfigError, match="`stop` got 0.1 with num_iterations=1"):
        ours(kind, tmp_path, trust_stop=0.1)


def test_two_reports_are_an_error_before_the_model_is_trained(tmp_path):
    trainer = ours("grpo", tmp_path, callbacks=[BoundReportCallback(report=False)])
    trainer.add_callback(BoundReportCallback(report=False))
    with pytest.raises(ConfigError, match="BoundReportCallback"):
        trainer.train()


@EACH
def test_the_model_card_says_how_far_the_run_moved(kind, tmp_path):
    trainer = ours(kind, tmp_path, trust_max_kl=0.01, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.create_model_card("name", dataset_name="data")
    card = (tmp_path / "README.md").read_text()
    for said in (
        "## How far it may have moved",
        "| anchor: KL(π‖π_ref) | beta=0.1 |",
        "range \\[0.8, 1.2\\], without effect: one optimizer step",
        "trust\\_max\\_kl=0.01 nats per token",
        "**KL to the reference** in the last of 3 updates",
        "at most 0.01 nats per token: backtracking enforced this bound",
    ):
        assert said.replace("\\", "") in card.replace("\\", ""), said
    assert card.count("## How far it may have moved") == 1
    unanchored = ours(kind, tmp_path / "b", kl_controller="fixed", beta=0.0, num_iterations=2, max_steps=2)
    unanchored.train()
    unanchored.create_model_card("name")
    card = (tmp_path / "b" / "README.md").read_text().replace("\\", "")
    assert "| anchor: KL(π‖π_ref) | off |" in card and "without effect" not in card and "Nothing: no mechanism" in card


@EACH
def test_fewer_rows_than_a_generation_batch_takes_are_an_error(kind, tmp_path):
    trainer, config, _, _ = KINDS[kind]
    args = config(str(tmp_path), **tiny.GROUPS, max_steps=1)
    needed = args.generation_batch_size // args.num_generations
    for rows, fails in ((needed - 1, True), (needed, False)):
        with pytest.raises(DataError, match=f"has {rows} rows, .* takes {needed} prompts") if fails else nullcontext():
            made = trainer(
                tiny.llama(), tiny.good_words, args, tiny.prompts(rows), None, tiny.tokenizer(), peft_config=tiny.lora()
            )
    made.train()
    assert made.state.global_step == 1
