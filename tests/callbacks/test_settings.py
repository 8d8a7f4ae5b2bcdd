"""What a run records about itself."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from tests import tiny
from trl_trustkl import BoundReportCallback, TrustKLGRPOConfig, TrustKLGRPOTrainer
from trl_trustkl.callbacks import settings
from trl_trustkl.report import read_run


def recorded(folder) -> dict:
    return json.loads((folder / "run_settings.json").read_text("utf-8"))


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_a_run_records_its_model_versions_hardware_and_options(tmp_path, trainer):
    name = str(tmp_path / "model")
    tiny.llama().save_pretrained(name)
    if trainer == "ppo":
        tiny.trainer(
            tmp_path,
            LlamaForCausalLM.from_pretrained(name),
            changes={"max_steps": 1, "seed": 7, "kl_controller": "dual", "kl_target": 1.0},
        ).train()
    else:
        args = TrustKLGRPOConfig(
            str(tmp_path), seed=7, kl_controller="dual", kl_target=1.0, beta=0.1, max_steps=1, max_completion_length=4,
            use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"token": "hf_secret", "revision": "main"},
        )  # fmt: skip
        TrustKLGRPOTrainer(
            model=name, args=args, processing_class=tiny.tokenizer(), train_dataset=tiny.prompts(),
            reward_funcs=lambda completions, **_: [1.0] * len(completions), callbacks=[BoundReportCallback()],
        ).train()  # fmt: skip
        assert recorded(tmp_path)["options"]["model_init_kwargs"] == {"token": "<hidden>", "revision": "main"}
    found = recorded(tmp_path)
    assert found["model"] == {"name": name, "class": "LlamaForCausalLM"}
    assert found["versions"]["Python"] == platform.python_version()
    assert found["versions"]["trl"] == metadata.version("trl") and "vllm" not in found["versions"]
    assert found["hardware"]["processes"] == 1 and "GPU" not in found["hardware"]
    options = found["options"]
    assert (options["seed"], options["kl_controller"], options["kl_target"]) == (7, "dual", 1.0)
    assert read_run(tmp_path).settings["options"]["seed"] == "7"


def test_the_card_is_named_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(
        settings, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 0), num_processes=2)
    )
    hardware = settings.settings_of(SimpleNamespace(to_dict=dict), torch.nn.Linear(1, 1))["hardware"]
    assert hardware["GPU"] == "a card" and hardware["processes"] == 2


def test_secrets_within_an_option_are_hidden_and_what_json_cannot_key_is_text():
    given = {
        "trust_max_kl_token": 0.1, "model_init_kwargs": {"hf_token": "hf_a", "device_map": {torch.nn.Linear: 0}, "token": None},
        "fsdp": [{"token": "hf_b"}], "more": {"headers": {"Authorization": "Bearer x"}}, "url": "http://u:p@h:8000/v1",
    }  # fmt: skip
    options = settings.settings_of(SimpleNamespace(to_dict=lambda: given), torch.nn.Linear(1, 1))["options"]
    text = json.dumps(options)
    assert not any(secret in text for secret in ("hf_a", "hf_b", "Bearer", "u:p"))
    assert options["trust_max_kl_token"] == 0.1 and options["url"] == "http://h:8000/v1"
    assert options["model_init_kwargs"]["token"] is None


def test_the_settings_of_an_earlier_run_are_kept_beside_its_records(tmp_path):
    for seed in (1, 2):
        tiny.trainer(tmp_path, changes={"max_steps": 1, "seed": seed}).train()
    assert recorded(tmp_path)["options"]["seed"] == 2
    assert json.loads((tmp_path / "run_settings.json.1").read_text("utf-8"))["options"]["seed"] == 1
    assert read_run(tmp_path / "bounds.jsonl.1").settings == {}
