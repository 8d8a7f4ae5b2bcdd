"""`trustkl train`: YAML, flags and processes make the same run, and errors are one line."""

from __future__ import annotations

import json
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests import tiny
from tests.cli.training import ROOT, flags, run_main, settings, start, timeless, write_yaml
from trl_trustkl import TrustKLPPOTrainer, load_records

# -- runs --------------------------------------------------------------------------------------------------------------


def test_yaml_and_flags_make_the_same_run(place: Path, tmp_path: Path, capsys) -> None:
    by_yaml, by_flags, overridden = (tmp_path / name for name in ("yaml", "flags", "overridden"))
    assert run_main("--config", write_yaml(tmp_path / "a.yaml", settings(place, by_yaml))) == 0
    said = capsys.readouterr().out
    assert run_main(*flags(settings(place, by_flags))) == 0
    file = write_yaml(tmp_path / "b.yaml", settings(place, tmp_path / "unused", kl_target=9.0))
    assert run_main(f"--config={file}", "--output-dir", str(overridden), "--kl_target", "2.0") == 0
    lines = timeless(by_yaml)
    assert len(lines) == 2 and lines == timeless(by_flags) == timeless(overridden)
    first = load_records(by_yaml)[0]
    assert first["anchor"]["target"] == 2.0 and first["trust"]["limit"] == 0.05
    for name in ("bounds.jsonl", "completions.jsonl", "report.html"):
        assert str(by_yaml / name) in said and (by_yaml / name).exists()
    assert json.loads((by_yaml / "adapter_config.json").read_text())["target_modules"]
    assert not (tmp_path / "unused").exists()


def test_the_flags_make_the_trainer_that_the_api_makes(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    assert run_main(*flags(settings(place, tmp_path / "flags", kl_controller_kwargs={"horizon": 100}))) == 0
    changes = {
        "max_steps": 2, "kl_controller": "adaptive", "kl_target": 2.0, "kl_horizon": 100, "trust_max_kl": 0.05,
    }  # fmt: skip

    def even(prompts, completions, **columns):
        return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]

    tiny.trainer(
        tmp_path / "api",
        tiny.llama(),
        changes=changes,
        reward_funcs=even,
        peft_config=LoraConfig(
            r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    ).train()
    assert timeless(tmp_path / "flags") == timeless(tmp_path / "api")


def test_several_rewards_with_weights_a_reference_and_a_value_model(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = settings(
        place, tmp_path / "run", reward_model_name_or_path=str(place / "judge"), reward_weights=[0.5, 1.0, 2.0, 0.25],
        reward_funcs=["my_rewards.wanted", "my_rewards:even", str(place / "judge")], max_steps=1, use_peft=False,
        ref_model=str(place / "model"), value_model=str(place / "judge"), model_init_kwargs={"local_files_only": True},
    )  # fmt: skip
    del run["lora_r"], run["lora_target_modules"]
    assert run_main(*flags(run)) == 0
    assert load_records(tmp_path / "run")[0]["score"] is not None
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_is_passed_on_as_trls_scripts_do(place: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    asked, known = [], []

    def train(self, **arguments):
        asked.append(arguments["resume_from_checkpoint"])
        known.append(self.args.resume_from_checkpoint)
        self.state.global_step = 1

    monkeypatch.setattr("trl_trustkl.ppo.trainer.TrustKLPPOTrainer.train", train)
    monkeypatch.setattr("trl_trustkl.cli.train._conclude", lambda *_: None)
    for value in ("True", "run/checkpoint-3", "false"):
        assert run_main(*flags(settings(place, tmp_path, resume_from_checkpoint=value))) == 0
    assert asked == [True, "run/checkpoint-3", None] and known == ["True", "run/checkpoint-3", "false"]
    assert "no effect" not in caplog.text


@pytest.mark.parametrize("failure", [None, OSError(28, "No space left on device")])
def test_the_report_is_rendered_once_and_its_failure_ends_no_run(
    place: Path, tmp_path: Path, monkeypatch, capsys, failure: OSError | None
) -> None:
    rendered = []

    def render(folder: Path) -> Path:
        rendered.append(folder)
        if failure is not None:
            raise failure
        return Path(folder) / "report.html"

    monkeypatch.setattr("trl_trustkl.report.render_report", render)
    monkeypatch.setattr("trl_trustkl.callbacks.bound_report.render_report", render)
    assert run_main(*flags(settings(place, tmp_path))) == 0
    assert len(rendered) == 1
    page = f"{rendered[0] / 'report.html'}" if failure is None else "none was rendered; trustkl report "
    assert f"Report:       {page}" in capsys.readouterr().out


def test_nothing_holds_the_model_when_the_process_group_ends(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()  # with accelerate's garbage collection, which conftest.py leaves out
    models, left = [], []
    trained = TrustKLPPOTrainer.train

    def train(self, **arguments):
        models.append(weakref.ref(self.model))
        return trained(self, **arguments)

    monkeypatch.setattr(TrustKLPPOTrainer, "train", train)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: left.extend(model() for model in models))
    assert run_main(*flags(settings(place, tmp_path))) == 0
    assert left == [None]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"kl_cof": 1}, 2, "unknown option --kl_cof 1. Did you mean --kl_coef?"),
        ({"kl_estimator": "k4"}, 2, "`kl_estimator` got 'k4'; it must be one of"),
        ({"kl_coef": -1}, 2, "`kl_coef` got -1.0; it must be a finite number >= 0"),
        ({"kl_coef": "much"}, 2, "invalid float value: 'much'"),
        ({"clip_kwargs": "{"}, 2, "`clip_kwargs` got '{', which is not JSON"),
        ({"num_mini_batches": 3}, 2, "`num_mini_batches` got 3; it must divide"),
        ({"model_name_or_path": "nowhere/at-all"}, 1, "`model_name_or_path` got 'nowhere/at-all', which cannot be loaded"),
        ({"model_name_or_path": None}, 2, "missing:\n    --model_name_or_path: the name"),
        ({"dataset_name": "missing.jsonl"}, 1, "`dataset_name` got 'missing.jsonl'; there is no such file"),
        ({"dataset_name": "nowhere/at-all"}, 1, "`dataset_name` got 'nowhere/at-all', which cannot be loaded"),
        ({"dataset_name": None}, 2, "missing:\n    --dataset_name: a name, a"),
        ({"dataset_train_split": "tran"}, 1, "`dataset_train_split` got 'tran'; the dataset has 'train'"),
        ({"eval_strategy": "steps", "eval_steps": 1}, 1, "`dataset_test_split` got 'test'; the dataset has 'train'"),
        ({"dataset_streaming": True, "max_steps": -1}, 2, "`max_steps` got -1 with a `train_dataset` that is an Iterable"),
        ({"reward_funcs": None}, 2, "missing:\n    --reward_funcs: package."),
        ({"reward_funcs": "no_such_module.f"}, 2, "there is no module 'no_such_module' to import"),
        ({"reward_funcs": "json.lods"}, 2, "'lods' does not exist"),
        ({"reward_funcs": "missing.py:f"}, 2, "`reward_funcs` got the file 'missing.py'; there is no such file"),
        ({"reward_funcs": "PLACE/my_rewards.py:LIMIT"}, 2, "'LIMIT' is not callable; there are: even, wanted"),
        ({"reward_funcs": "nowhere/at-all"}, 1, "`reward_funcs` got 'nowhere/at-all', which cannot be loaded"),
        ({"reward_weights": [1.0, 2.0]}, 2, "`reward_weights` got 2 for 1 reward functions"),
        ({"ref_model": "nowhere/at-all"}, 1, "`ref_model` got 'nowhere/at-all', which cannot be loaded"),
        ({"reward_model_path": "judge"}, 2, "trustkl train takes `reward_model_name_or_path`"),
        ({"bf16": True, "fp16": True}, 2, "At most one of fp16 and bf16"),
        ({"load_in_4bit": True, "load_in_8bit": True}, 2, "8 bit and 4 bit precision at the same time"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(place: Path, tmp_path: Path, capsys, changes, status, message) -> None:
    changes = {k: v.replace("PLACE", str(place)) if isinstance(v, str) else v for k, v in changes.items()}
    run = {name: value for name, value in settings(place, tmp_path / "run", **changes).items() if value is not None}
    assert run_main(*flags(run)) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run" / "bounds.jsonl").exists()


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("module", ["trl_trustkl", "trl_trustkl.cli"])
def test_two_processes_make_one_run(place: Path, tmp_path: Path, module: str) -> None:
    run = settings(place, tmp_path / "run", gradient_accumulation_steps=1)
    process = start(
        "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/cpu_gloo.yaml"), "-m", module,
        "train", "--config", write_yaml(tmp_path / "run.yaml", run),
    )  # fmt: skip
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert out.count("Records:") == 1
    records = load_records(tmp_path / "run")
    assert [(record["update"], record["episode"]) for record in records] == [(1, 8), (2, 16)]
    completions = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert len(completions) == 16
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_status_and_keeps_the_records(place, tmp_path, number, status) -> None:
    process = start("trl_trustkl", "train", *flags(settings(place, tmp_path, max_steps=10_000)))
    deadline = time.monotonic() + 120
    while not (tmp_path / "bounds.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert load_records(tmp_path)
