"""`trustkl train` with GRPO and RLOO: TRL's trainers with this package's trust region, by the conventions of `trl grpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl.rewards import think_format_reward

from tests.cli.training import flags, run_main, settings, write_yaml
from trl_trustkl import TrustKLGRPOConfig, TrustKLRLOOConfig, load_records
from trl_trustkl.cli import train_inputs, train_options

PPO_ONLY = (
    "num_mini_batches", "num_ppo_epochs", "response_length", "num_sample_generations", "kl_controller", "kl_target",
    "kl_controller_kwargs",
)  # fmt: skip


def options(place: Path, output: Path, trainer: str = "grpo", **changes: Any) -> dict[str, Any]:
    run = {name: value for name, value in settings(place, output).items() if name not in PPO_ONLY}
    run |= {"trainer": trainer, "num_generations": 4, "max_completion_length": 6, "beta": 0.1, "trust_max_kl": 0.01}
    return run | {"learning_rate": 1e-1, "gradient_accumulation_steps": 2} | changes


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_a_run_is_limited_recorded_and_saved(place: Path, tmp_path: Path, capsys, trainer: str) -> None:
    assert run_main("--config", write_yaml(tmp_path / "run.yaml", options(place, tmp_path / "run", trainer))) == 0
    records = load_records(tmp_path / "run")
    assert [record["update"] for record in records] == [1, 2]
    assert all(0 < record["trust"]["kl"] <= 0.01 and record["trust"]["limit"] == 0.01 for record in records)
    assert any(record["binding"] == "backtrack" for record in records)
    said = capsys.readouterr().out
    for name in ("bounds.jsonl", "completions.jsonl", "report.html"):
        assert (tmp_path / "run" / name).exists() and str(tmp_path / "run" / name) in said
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 4


def test_flags_select_the_trainer_and_override_the_file(place: Path, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", options(place, tmp_path))
    assert isinstance(train_options.parse(["--config", file]).training, TrustKLGRPOConfig)
    parsed = train_options.parse(
        ["--config", file, "--trainer", "rloo", "--kl_controller", "adaptive", "--kl_target", "0.1"]
    )
    assert isinstance(parsed.training, TrustKLRLOOConfig) and parsed.training.kl_target == 0.1
    assert train_options.parse([f"--config={file}", "--trainer=rloo"]).script.trainer == "rloo"


def test_the_model_is_loaded_by_trl_as_the_flags_say(place: Path, tmp_path: Path) -> None:
    changes = {
        "model_revision": "main",
        "dtype": "float32",
        "load_in_4bit": True,
        "model_init_kwargs": {"use_cache": False},
    }
    parsed = train_options.parse(flags(options(place, tmp_path, **changes)))
    named = train_inputs.name_models(parsed)
    assert named["model"] == str(place / "model") and named["quantization_config"].load_in_4bit
    assert named["peft_config"].r == 4
    assert (
        parsed.training.model_init_kwargs["revision"] == "main"
        and parsed.training.model_init_kwargs["dtype"] == "float32"
    )
    assert parsed.training.model_init_kwargs["use_cache"] is False


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_trls_reward_functions_are_taken_by_name(place: Path, tmp_path: Path, trainer: str) -> None:
    names = ["think_format_reward", "get_soft_overlong_punishment"]
    run = (
        options(place, tmp_path, reward_funcs=names)
        if trainer == "grpo"
        else settings(place, tmp_path, reward_funcs=names)
    )
    found = train_inputs.load_rewards(train_options.parse(flags(run)))
    assert found["reward_funcs"][0] is think_format_reward and found["reward_processing_classes"] == [None, None]
    assert found["reward_funcs"][1]([[0] * 1281]) == [-1]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"trainer": "gropo"}, 2, "`trainer` got 'gropo'"),
        ({"value_model": "judge"}, 2, "unknown option --value_model judge"),
        ({"num_ppo_epochs": 2}, 2, "unknown option --num_ppo_epochs 2"),
        ({"trust_max_kl": -1}, 2, "`trust_max_kl` got -1.0"),
        ({"num_generations": 3}, 2, "num_generations"),
        ({"trust_stop": 0.1}, 2, "`stop` got 0.1"),
        ({"beta": 0.0, "sync_ref_model": True}, 2, "GRPO trainer rejects these options: You passed `sync_ref_model=True`"),
        ({"dataset_name": "missing.jsonl"}, 1, "there is no such file"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(place: Path, tmp_path: Path, capsys, changes, status, message) -> None:
    assert run_main(*flags(options(place, tmp_path, **changes))) == status
    said = capsys.readouterr().err
    assert message in said.replace("\n", " ") and "Traceback" not in said


def test_the_help_is_that_of_the_trainer(capsys) -> None:
    said = {}
    for trainer in ("ppo", "grpo", "rloo"):
        with pytest.raises(SystemExit):
            train_options.parse(["--trainer", trainer, "--help"])
        said[trainer] = capsys.readouterr().out
        assert f"\n{trainer.upper()}:\n" in said[trainer] and f"\n{trainer.upper()} on TRL" in said[trainer]
        assert max(map(len, said[trainer].splitlines())) <= 80
    assert "--num_iterations" in said["grpo"] and "--num_iterations" not in said["ppo"]
    assert "--trust_max_kl" in said["rloo"] and "--num_ppo_epochs" not in said["rloo"]
