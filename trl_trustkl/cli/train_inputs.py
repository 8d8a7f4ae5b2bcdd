"""The datasets, models and reward functions of `trustkl train`, loaded from its options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import get_dataset, get_peft_config, get_quantization_config

from ..errors import DataError, ModelError, TrustKLError
from ..import_paths import load_function
from ..policy.loading import of_other_repository, of_tokenizer
from ..rollout.prompts import AnyDataset
from .train_options import Options

VALID = "package.module.function, path/to/file.py:function, or the name or folder of a reward model"
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_datasets(options: Options) -> tuple[AnyDataset, AnyDataset | None]:
    """The training split, and the test split if the run evaluates. DataError for missing data or a missing split."""
    script = options.script
    with _as_error(DataError, "dataset_name", script.dataset_name or "datasets"):
        splits = get_dataset(options.mixture) if options.mixture.datasets else _splits(script)

    def split(field: str) -> AnyDataset:
        name = getattr(script, field)
        if name not in splits:
            raise DataError(
                f"`{field}` got {name!r}; the dataset has {', '.join(map(repr, splits))}. A folder with train.jsonl and "
                "test.jsonl has both splits."
            )
        return splits[name]

    evaluates = options.training.eval_strategy != "no"
    return split("dataset_train_split"), split("dataset_test_split") if evaluates else None


def _splits(script: Any) -> Any:
    """The splits in a file, in a folder that datasets saved, or in what `load_dataset` finds under the name."""
    path = Path(script.dataset_name)
    if path.suffix in _FILES:
        if not path.is_file():
            raise DataError(f"`dataset_name` got {script.dataset_name!r}; there is no such file.")
        return load_dataset(_FILES[path.suffix], data_files=str(path), streaming=script.dataset_streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
        return {
            name: split.to_iterable_dataset() if script.dataset_streaming else split for name, split in splits.items()
        }
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def load_models(options: Options) -> dict[str, Any]:
    """Policy, tokenizer, adapter, reference model and value model, as arguments of the trainer."""
    model, training, script = options.model, options.training, options.script
    name = model.model_name_or_path
    assert name is not None  # `parse` rejects options without it
    settings: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **training.arguments("model_init_kwargs"),
    }
    quantized = {"quantization_config": config} if (config := get_quantization_config(model)) is not None else {}
    with _as_error(ModelError, "model_name_or_path", name):
        loaded = {
            "model": AutoModelForCausalLM.from_pretrained(name, **settings, **quantized),
            "processing_class": AutoTokenizer.from_pretrained(name, **of_tokenizer(settings)),
            "peft_config": get_peft_config(model),
        }
    if script.ref_model:
        shared = settings if script.ref_model == name else of_other_repository(settings)
        with _as_error(ModelError, "ref_model", script.ref_model):
            loaded["ref_model"] = AutoModelForCausalLM.from_pretrained(script.ref_model, **shared, **quantized)
    if script.value_model:
        shared = settings if script.value_model == name else of_other_repository(settings)
        with _as_error(ModelError, "value_model", script.value_model):
            loaded["value_model"] = AutoModelForSequenceClassification.from_pretrained(
                script.value_model, num_labels=1, **shared
            )
    return loaded


def load_rewards(options: Options) -> dict[str, list[Any]]:
    """Reward functions and models with their tokenizers, in the order of `reward_weights`, as arguments of the trainer."""
    script = options.script
    # A reward model is loaded with its own configuration; of the policy's arguments it gets those for the Hub.
    access = of_tokenizer(of_other_repository(options.training.arguments("model_init_kwargs")))
    found = [_reward(name, access) for name in script.reward_funcs or []]
    if script.reward_model_name_or_path:
        found.insert(0, _reward_model("reward_model_name_or_path", script.reward_model_name_or_path, access))
    funcs, tokenizers = zip(*found, strict=True)
    return {"reward_funcs": list(funcs), "reward_processing_classes": list(tokenizers)}


def _reward(name: str, access: dict[str, Any]) -> tuple[Any, Any]:
    """A function if the name is an import path, else a model; a folder is a model whatever its name."""
    dotted = "." in name and all(part.isidentifier() for part in name.split("."))
    if not Path(name).is_dir() and (name.find(":") > 0 or dotted):
        return load_function("reward_funcs", name, VALID), None
    return _reward_model("reward_funcs", name, access)


def _reward_model(field: str, name: str, access: dict[str, Any]) -> tuple[Any, Any]:
    with _as_error(ModelError, field, name):
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **access)
        return model, AutoTokenizer.from_pretrained(name, **access)


@contextmanager
def _as_error(kind: type[TrustKLError], field: str, value: str) -> Iterator[None]:
    """Raise a library's error about something it cannot load as a `kind`, with the field that names it."""
    try:
        yield
    except TrustKLError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise kind(f"`{field}` got {value!r}, which cannot be loaded: {' '.join(str(error).split())}") from error
