"""The datasets, models and reward functions of `trustkl train`, loaded from its options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import get_dataset, get_peft_config, get_quantization_config, rewards

from ..errors import DataError, ModelError, TrustKLError
from ..import_paths import load_function
from ..policy.loading import of_other_repository, of_tokenizer
from ..policy.precision import dtype_to_load
from ..rollout.prompts import AnyDataset
from .train_options import Options, TrainArguments

TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
"""TRL's reward functions that `trl grpo` takes by name."""
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


def name_models(options: Options) -> dict[str, Any]:
    """The policy's name, its quantization and its adapter, as arguments of TRL's GRPO and RLOO trainers, which load it and its
    reference with the configuration's `model_init_kwargs`."""
    options.training.model_init_kwargs = _settings(options)
    return {
        "model": options.model.model_name_or_path,
        "peft_config": get_peft_config(options.model),
        "quantization_config": get_quantization_config(options.model),
    }


def _settings(options: Options) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the policy."""
    return {
        "revision": options.model.model_revision,
        "attn_implementation": options.model.attn_implementation,
        "dtype": options.model.dtype,
        **(options.training.model_init_kwargs or {}),
    }


def load_models(options: Options) -> dict[str, Any]:
    """Policy, tokenizer, adapter, reference model and value model, as arguments of TrustKLPPOTrainer."""
    model, script = options.model, options.script
    assert isinstance(script, TrainArguments)
    name = model.model_name_or_path
    assert name is not None  # `parse` rejects options without it
    settings = _settings(options)
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
    access = of_tokenizer(of_other_repository(options.training.model_init_kwargs or {}))
    dtype = dtype_to_load(options.training)
    found = [_reward(name, access, dtype) for name in script.reward_funcs or []]
    if script.reward_model_name_or_path:
        found.insert(0, _reward_model("reward_model_name_or_path", script.reward_model_name_or_path, access, dtype))
    funcs, tokenizers = zip(*found, strict=True)
    return {"reward_funcs": list(funcs), "reward_processing_classes": list(tokenizers)}


def _reward(name: str, access: dict[str, Any], dtype: dict[str, Any]) -> tuple[Any, Any]:
    """A function if the name is an import path, else a model; a folder is a model whatever its name."""
    dotted = "." in name and all(part.isidentifier() for part in name.split("."))
    if name in TRL_REWARDS:
        return _of_trl(name), None
    if not Path(name).is_dir() and (name.find(":") > 0 or dotted):
        return load_function("reward_funcs", name, VALID), None
    return _reward_model("reward_funcs", name, access, dtype)


def _of_trl(name: str) -> Any:
    """TRL's function of that name, with the settings of `trl grpo`."""
    func = getattr(rewards, name)
    return func(max_completion_len=1280, soft_punish_cache=256) if name == "get_soft_overlong_punishment" else func


def _reward_model(field: str, name: str, access: dict[str, Any], dtype: dict[str, Any]) -> tuple[Any, Any]:
    with _as_error(ModelError, field, name):
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **access, **dtype)
        return model, AutoTokenizer.from_pretrained(name, **access)


@contextmanager
def _as_error(kind: type[TrustKLError], field: str, value: str) -> Iterator[None]:
    """Raise a library's error about something it cannot load as a `kind`, with the field that names it."""
    try:
        yield
    except TrustKLError:
        raise
    except (
        OSError,
        ValueError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        AttributeError,
        DatasetsError,
    ) as error:
        raise kind(f"`{field}` got {value!r}, which cannot be loaded: {' '.join(str(error).split())}") from error
