"""The classes that replace TRL 1.12's PPO classes: the attributes that a model card reads, and the defaults."""

from __future__ import annotations

import pytest
import yaml

from tests import tiny
from trl_trustkl.trl_compat import ppo_base


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
