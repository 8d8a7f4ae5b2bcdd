"""`trustkl train`: YAML, flags and processes make the same run, and what cannot work is said in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from datasets import Dataset, DatasetDict

from tests import tiny
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.cli import main, train_inputs, train_options

ROOT = Path(__file__).resolve().parent.parent
REWARDS = """
def even(prompts, completions, **columns):
    return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]

def wanted(prompts, completions, wanted, **columns):
    return [float(word in text) for word, text in zip(wanted, completions)]

LIMIT = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a reward model, prompts, and a file of reward functions."""
    folder = tmp_path_factory.mktemp("train")
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    for name, each in (("model", model), ("judge", tiny.scalar_model(model))):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = tiny.prompts().to_list()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def settings(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    run = {
        "model_name_or_path": str(place / "model"), "dataset_name": str(place / "prompts.jsonl"),
        "reward_funcs": [f"{place / 'my_rewards.py'}:even"], "output_dir": str(output), "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "response_length": 6, "temperature": 1.0, "learning_rate": 1e-3, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0,
        "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "report_to": "none",
        "kl_controller": "adaptive", "kl_target": 2.0, "kl_controller_kwargs": {"horizon": 100}, "trust_max_kl": 0.05,
    }  # fmt: skip
    return {**run, **changes}


def flags(run: dict[str, Any]) -> list[str]:
    """The same options as a command line."""
    words = []
    for name, value in run.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def write_yaml(path: Path, run: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(run))
    return str(path)


def timeless(folder: Path) -> list[str]:
    """The lines of bounds.jsonl as bytes of JSON, without what depends on the clock."""
    rows = map(json.loads, (folder / "bounds.jsonl").read_text().splitlines())
    return [json.dumps({**row, "seconds": None}) for row in rows]


def run_main(*words: str) -> int:
    """The exit status, whichever way it comes out."""
    try:
        return main(["train", *words])
    except SystemExit as ended:
        return ended.code


# -- Runs --------------------------------------------------------------------------------------------------------------


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
        ref_model=str(place / "model"), value_model=str(place / "judge"),
    )  # fmt: skip
    assert run_main(*flags(run)) == 0
    assert load_records(tmp_path / "run")[0]["score"] is not None
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_rewards_come_in_the_order_of_their_weights(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = settings(place, place, reward_funcs=["my_rewards.even"], reward_model_name_or_path=str(place / "judge"))
    loaded = train_inputs.load_rewards(train_options.parse(flags(run)))
    assert [type(func).__name__ for func in loaded["reward_funcs"]] == ["LlamaForSequenceClassification", "function"]
    assert [each is None for each in loaded["reward_processing_classes"]] == [False, True]


def test_quantisation_and_lora_flags_are_trls(place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = settings(
        place, place, load_in_4bit=True, dtype="float32", lora_target_modules=["all-linear"], use_rslora=True
    )
    loaded = train_inputs.load_models(train_options.parse(flags(run)))
    assert loaded["model"].is_loaded_in_4bit
    config = loaded["peft_config"]
    assert (config.r, config.target_modules, config.use_rslora) == (4, "all-linear", True)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "folder", "saved", "saved_dict"])
def test_a_dataset_comes_from_a_file_or_a_folder(place: Path, tmp_path: Path, suffix: str) -> None:
    data = Dataset.from_dict({"prompt": ["w1 w2", "w3"], "wanted": ["w1", "w2"]})
    path = tmp_path / ("data" if suffix in ("folder", "saved", "saved_dict") else f"data.{suffix}")
    evaluates = suffix in ("folder", "saved_dict")
    if suffix == "folder":
        path.mkdir()
        for split in ("train", "test"):
            data.to_json(path / f"{split}.jsonl")
    elif suffix == "saved":
        data.save_to_disk(path)
    elif suffix == "saved_dict":
        DatasetDict(train=data, test=data).save_to_disk(path)
    else:
        getattr(data, f"to_{suffix}")(path)
    run = settings(place, tmp_path, dataset_name=str(path), eval_strategy="steps" if evaluates else "no", eval_steps=1)
    train, test = train_inputs.load_datasets(train_options.parse(flags(run)))
    assert train["prompt"] == ["w1 w2", "w3"]
    assert (test is not None) == evaluates


def test_a_mixture_of_datasets_comes_from_yaml(place: Path, tmp_path: Path) -> None:
    part = {"path": "json", "data_files": str(place / "prompts.jsonl"), "columns": ["prompt"]}
    run = settings(place, tmp_path, datasets=[part, part])
    del run["dataset_name"]
    train, _ = train_inputs.load_datasets(train_options.parse(["--config", write_yaml(tmp_path / "c.yaml", run)]))
    assert len(train) == 32 and train.column_names == ["prompt"]


def test_a_checkpoint_is_passed_on_as_trls_scripts_do(place: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("trl_trustkl.ppo.trainer.TrustKLPPOTrainer.train", lambda self, **k: asked.append(k))
    monkeypatch.setattr("trl_trustkl.cli.train._conclude", lambda *_: None)
    for value in ("True", "run/checkpoint-3", "false"):
        assert run_main(*flags(settings(place, tmp_path, resume_from_checkpoint=value))) == 0
    assert [each["resume_from_checkpoint"] for each in asked] == [True, "run/checkpoint-3", None]


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


# -- What cannot work --------------------------------------------------------------------------------------------------


def test_nothing_holds_the_model_when_the_process_group_ends(place: Path, tmp_path: Path, monkeypatch) -> None:
    models, left = [], []
    trained = TrustKLPPOTrainer.train

    def train(self, **arguments):
        models.append(weakref.ref(self.model))
        return trained(self, **arguments)

    monkeypatch.setattr(TrustKLPPOTrainer, "train", train)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: left.extend(model() for model in models))
    assert run_main(*flags(settings(place, tmp_path))) == 0
    assert left == [None]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"kl_cof": 1}, 2, "unknown option --kl_cof 1. Did you mean --kl_coef?"),
        ({"kl_estimator": "k4"}, 2, "invalid choice: 'k4'"),
        ({"kl_coef": -1}, 2, "`kl_coef` got -1.0; it must be a finite number >= 0"),
        ({"kl_coef": "much"}, 2, "invalid float value: 'much'"),
        ({"clip_kwargs": "{"}, 2, "`clip_kwargs` got '{', which is not JSON"),
        ({"num_mini_batches": 3}, 2, "`num_mini_batches` got 3; it must divide"),
        ({"model_name_or_path": "nowhere/at-all"}, 1, "`model_name_or_path` got 'nowhere/at-all', which cannot be loaded"),
        ({"model_name_or_path": None}, 2, "`model_name_or_path` got None"),
        ({"dataset_name": "missing.jsonl"}, 1, "`dataset_name` got 'missing.jsonl'; there is no such file"),
        ({"dataset_name": "nowhere/at-all"}, 1, "`dataset_name` got 'nowhere/at-all', which cannot be loaded"),
        ({"dataset_name": None}, 2, "`dataset_name` got None and `datasets` []; give exactly one"),
        ({"dataset_train_split": "tran"}, 1, "`dataset_train_split` got 'tran'; the dataset has 'train'"),
        ({"eval_strategy": "steps", "eval_steps": 1}, 1, "`dataset_test_split` got 'test'; the dataset has 'train'"),
        ({"dataset_streaming": True}, 2, "`dataset_streaming` got True"),
        ({"reward_funcs": None}, 2, "`reward_funcs` got nothing"),
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
def test_what_cannot_work_is_said_in_one_line(place: Path, tmp_path: Path, capsys, changes, status, message) -> None:
    changes = {k: v.replace("PLACE", str(place)) if isinstance(v, str) else v for k, v in changes.items()}
    run = {name: value for name, value in settings(place, tmp_path / "run", **changes).items() if value is not None}
    assert run_main(*flags(run)) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run" / "bounds.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it must be a YAML file of options"),
        ("- a list", "must contain a YAML mapping"),
        ("a: [", "while parsing"),
        ("kl_cof: 1", "unknown option --kl_cof 1. Did you mean --kl_coef?"),
        ("kl_estimator: k4", "`kl_estimator` got 'k4'"),
    ],
)
def test_a_yaml_file_that_cannot_work_is_said_in_one_line(
    place: Path, tmp_path: Path, capsys, content, message
) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    run = flags({k: v for k, v in settings(place, tmp_path / "run").items() if not k.startswith("kl_")})
    assert run_main("--config", str(file), *run) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_reward_file_that_fails_to_import_says_why(place: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    assert run_main(*flags(settings(place, tmp_path / "run", reward_funcs=f"{tmp_path / 'broken.py'}:f"))) == 2
    assert "importing it raised ZeroDivisionError" in capsys.readouterr().err


def test_options_of_other_commands_are_still_checked(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "somewhere", "--wide"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --wide" in capsys.readouterr().err


# -- Help --------------------------------------------------------------------------------------------------------------


def test_help_fits_80_columns_and_shows_what_is_ours(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main("--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for option in ("--trust_max_kl NUMBER", "--kl_estimator VALUE", "--lora_r INT", "--reward_funcs VALUE ..."):
        assert f"\n  {option}\n" in text
    assert "One of: none, ppo, dual" in " ".join(text.split()) and "(default: 0.05)" in text
    assert "--adam_beta1" not in text and "--sft_model_path" not in text and "143 after" in text
    assert run_main("--help-all") == 0
    assert "--adam_beta1 NUMBER" in capsys.readouterr().out


def test_every_field_of_ours_has_a_help_text(capsys) -> None:
    from dataclasses import fields

    from trl_trustkl import TrustKLPPOConfig
    from trl_trustkl.options import about

    own = [each for each in fields(TrustKLPPOConfig) if about(each).group]
    added = train_options.TrainArguments.__annotations__
    own += [each for each in fields(train_options.TrainArguments) if each.name in added]
    run_main("--help")
    text = capsys.readouterr().out
    assert len(own) > 50
    for each in own:
        assert each.metadata["help"] and f"--{each.name} " in text


def test_the_exit_statuses_are_documented(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for status in ("0;", "1 for an error of the run", "2 for one of usage", "130 after Ctrl-C", "143 after SIGTERM"):
        assert status in said


# -- Processes ---------------------------------------------------------------------------------------------------------


def start(*words: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


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
