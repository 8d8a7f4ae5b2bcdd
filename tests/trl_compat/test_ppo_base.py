"""The classes that replace TRL 1.12's PPO classes: fields, defaults, and the attributes that a model card reads."""

from __future__ import annotations

import typing

import pytest
import yaml

from tests import tiny
from tests.trl_fields import TRL_FIELDS, default, fields
from trl_trustkl.trl_compat import ppo_base

pytestmark = pytest.mark.filterwarnings("ignore")


def test_our_base_has_the_fields_and_defaults_of_trls():
    mine = fields(ppo_base.PPOConfig)
    assert {name: mine[name].default for name in TRL_FIELDS} == TRL_FIELDS
    inherited = fields(ppo_base._BaseConfig)
    assert set(mine) - set(inherited) == set(TRL_FIELDS) - set(inherited)


def test_our_base_equals_trls_configuration_field_by_field():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
    theirs, mine = fields(ppo.PPOConfig), fields(ppo_base.PPOConfig)
    assert theirs.keys() == mine.keys()
    their_types, my_types = typing.get_type_hints(ppo.PPOConfig), typing.get_type_hints(ppo_base.PPOConfig)
    for name in theirs:
        assert default(theirs[name]) == default(mine[name]), name
        assert their_types[name] == my_types[name], name


def test_the_names_and_the_paper_are_those_of_trls_trainer():
    trainer = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer").PPOTrainer
    for name in ("_tag_names", "_name", "_paper"):
        assert getattr(ppo_base.PPOTrainer, name) == getattr(trainer, name), name


def test_a_model_card_names_the_method_and_its_paper(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.create_model_card(model_name="m")
    text = (tmp_path / "README.md").read_text("utf-8")
    assert {"trl", "ppo"} <= set(yaml.safe_load(text.split("---\n")[1])["tags"])
    assert "trained with PPO" in text and ppo_base.PPOTrainer._paper["title"] in text
    assert f"papers/{ppo_base.PPOTrainer._paper['id']}" in text and "mziegler2019fine-tuning" in text


def test_a_configuration_has_trls_defaults_and_checks_of_its_base(tmp_path):
    config = ppo_base.PPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    assert (config.learning_rate, config.num_ppo_epochs, config.kl_coef, config.lam) == (3e-6, 4, 0.05, 0.95)
    assert config.stop_token is None and config.temperature == 0.7 and config.batch_size is None
