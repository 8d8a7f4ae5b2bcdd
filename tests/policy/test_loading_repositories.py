"""The arguments that say which files of the Hub are read: each model and tokenizer gets those of its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import tiny
from trl_trustkl.policy.loading import load_causal_lm, load_tokenizer, of_other_repository, of_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

ACCESS = {"token": "hf_secret", "cache_dir": "cache", "local_files_only": True}
SETTINGS = {**ACCESS, "trust_remote_code": True, "revision": "v1", "dtype": "float32"}
Call = tuple[str, str, dict[str, Any]]


@pytest.fixture
def calls(monkeypatch) -> list[Call]:
    """What is loaded from now on: the kind, the name of the folder, and the arguments."""
    found: list[Call] = []

    def record(kind: Any) -> None:
        original = kind.from_pretrained

        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            name = args[1] if kind is PeftModel else args[0]
            found.append((kind.__name__, Path(name).name, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PeftModel):
        record(kind)
    return found


def saved(folder: Path, model: Any, *, tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def test_a_tokenizer_gets_the_arguments_for_its_files_and_another_repository_no_revision():
    settings = SETTINGS | {"subfolder": "policy", "code_revision": "v2"}
    assert of_other_repository(settings) == {**ACCESS, "trust_remote_code": True, "dtype": "float32"}
    assert of_tokenizer(settings) == without(settings, "dtype", "subfolder")
    assert of_tokenizer(None) == of_other_repository(None) == {}


@pytest.mark.parametrize("same", [True, False], ids=["the policy's repository", "others"])
def test_models_by_name_and_their_tokenizers_get_the_arguments_of_the_policy(tmp_path, calls, same):
    """The revision only in the policy's own repository."""
    policy = saved(tmp_path / "policy", tiny.llama())
    others = {name: saved(tmp_path / name, tiny.llama()) for name in ("reference", "value")}
    judge = saved(tmp_path / "judge", tiny.scalar_model(tiny.llama()))
    tiny.trainer(
        tmp_path / "run",
        policy,
        processing_class=None,
        ref_model=policy if same else others["reference"],
        value_model=policy if same else others["value"],
        reward_funcs=[judge, judge],
        reward_processing_classes=[None, tiny.tokenizer()],
        changes={"model_init_kwargs": SETTINGS},
    )
    elsewhere = without(SETTINGS, "revision")
    beside = SETTINGS if same else elsewhere
    expected = [
        ("AutoTokenizer", "policy", without(SETTINGS, "dtype")),
        ("AutoModelForCausalLM", "policy", SETTINGS),
        ("AutoTokenizer", "judge", without(elsewhere, "dtype")),
        ("AutoModelForSequenceClassification", "judge", {"num_labels": 1, **elsewhere}),
        ("AutoModelForSequenceClassification", "judge", {"num_labels": 1, **elsewhere}),
        ("AutoModelForSequenceClassification", "policy" if same else "value", {"num_labels": 1, **beside}),
        ("AutoModelForCausalLM", "policy" if same else "reference", beside),
    ]
    assert calls == expected


@pytest.mark.parametrize("revision", [None, "of-the-base"])
def test_the_base_model_of_an_adapter_has_the_revision_that_the_adapter_names(tmp_path, calls, revision):
    saved(tmp_path / "base", tiny.llama())
    adapter = tiny.tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapter.peft_config["default"].revision = revision
    name = saved(tmp_path / "sft", adapter, tokenizer=False)
    calls.clear()
    settings = {**ACCESS, "trust_remote_code": True, "revision": "of-the-adapter"}
    load_tokenizer(name, settings)
    load_causal_lm(name, settings)
    of_base = without(settings, "revision") | ({} if revision is None else {"revision": revision})
    assert calls == [
        ("AutoTokenizer", "sft", settings),
        ("AutoTokenizer", "base", of_base),
        ("AutoModelForCausalLM", "base", of_base),
        ("PeftModel", "sft", {"is_trainable": True, **ACCESS, "revision": "of-the-adapter"}),
    ]
