"""Datasets, models and reward functions of `trustkl train`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from tests import tiny
from tests.cli.training import flags, run_main, settings, write_yaml
from trl_trustkl.cli import train_inputs, train_options
from trl_trustkl.policy import cpu


def test_rewards_come_in_the_order_of_their_weights(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = settings(place, place, reward_funcs=["my_rewards.even"], reward_model_name_or_path=str(place / "judge"))
    loaded = train_inputs.load_rewards(train_options.parse(flags(run)))
    assert [type(func).__name__ for func in loaded["reward_funcs"]] == ["LlamaForSequenceClassification", "function"]
    assert [each is None for each in loaded["reward_processing_classes"]] == [False, True]


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_reward_model_is_in_float32_on_a_cpu_without_bf16_instructions(
    place: Path, tmp_path: Path, monkeypatch, has: bool, dtype: torch.dtype
) -> None:
    tiny.scalar_model(tiny.llama()).to(torch.bfloat16).save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: has)
    run = settings(place, tmp_path, reward_funcs=[str(tmp_path / "judge")])
    run.pop("bf16")
    parsed = train_options.parse(["--config", write_yaml(tmp_path / "run.yaml", run)])
    assert parsed.training.bf16 is has
    assert train_inputs.load_rewards(parsed)["reward_funcs"][0].dtype == dtype


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
    run |= {"dataset_streaming": True, "max_steps": 2}
    train, test = train_inputs.load_datasets(train_options.parse(flags(run)))
    assert isinstance(train, IterableDataset) and [row["prompt"] for row in train] == ["w1 w2", "w3"]
    assert isinstance(test, IterableDataset) == evaluates


def test_a_mixture_of_datasets_comes_from_yaml(place: Path, tmp_path: Path) -> None:
    part = {"path": "json", "data_files": str(place / "prompts.jsonl"), "columns": ["prompt"]}
    run = settings(place, tmp_path, datasets=[part, part])
    del run["dataset_name"]
    train, _ = train_inputs.load_datasets(train_options.parse(["--config", write_yaml(tmp_path / "c.yaml", run)]))
    assert len(train) == 32 and train.column_names == ["prompt"]


def test_a_reward_file_that_fails_to_import_says_why(place: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    assert run_main(*flags(settings(place, tmp_path / "run", reward_funcs=f"{tmp_path / 'broken.py'}:f"))) == 2
    assert "importing it raised ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False], ids=["the policy's repository", "others"])
def test_revision_and_remote_code_reach_every_model_and_tokenizer(place: Path, monkeypatch, same: bool) -> None:
    """The revision only those of the policy's repository; the token and the cache as remote code."""
    calls = []

    def recorder(kind: str):
        def from_pretrained(name: str, **kwargs):
            calls.append((kind, Path(name).name, {key: kwargs[key] for key in (*given, "revision") if key in kwargs}))

        return from_pretrained

    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        monkeypatch.setattr(getattr(train_inputs, kind), "from_pretrained", recorder(kind))
    given = {"trust_remote_code": True, "token": "hf_secret", "cache_dir": "cache"}
    pinned = given | {"revision": "v1"}
    other = str(place / ("model" if same else "judge"))
    run = settings(
        place, place, model_revision="v1", model_init_kwargs=given, ref_model=other, value_model=other,
        reward_funcs=[str(place / "judge")], reward_model_name_or_path="org/judge",
    )  # fmt: skip
    options = train_options.parse(flags(run))
    train_inputs.load_models(options)
    train_inputs.load_rewards(options)
    beside = Path(other).name, pinned if same else given
    assert calls == [
        ("AutoModelForCausalLM", "model", pinned),
        ("AutoTokenizer", "model", pinned),
        ("AutoModelForCausalLM", *beside),
        ("AutoModelForSequenceClassification", *beside),
        *[("AutoModelForSequenceClassification", "judge", given), ("AutoTokenizer", "judge", given)] * 2,
    ]
