"""What vLLM needs to know of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.vllm_server import loaded, saved
from trl_trustkl.errors import ModelError
from trl_trustkl.rollout import vllm_model as module
from trl_trustkl.rollout.vllm_model import VLLMModel, vllm_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture
def args(tmp_path: Path) -> Any:
    return tiny.config(tmp_path)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_base_model_is_loaded_from_where_the_policy_was(folder, args, kind):
    policy = loaded(folder) if kind == "full" else get_peft_model(loaded(folder), tiny.lora())
    assert vllm_model(policy, args) == VLLMModel(str(folder), torch.float32, tiny.VOCAB, {}, False)


def test_the_vocabulary_is_that_of_the_policy_and_not_of_its_files(folder, args):
    policy = loaded(folder)
    policy.resize_token_embeddings(50)
    assert vllm_model(policy, args).vocabulary == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_training_pass(folder, args, tmp_path, dtype):
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = vllm_model(policy, args)
    assert found.dtype == dtype and found.dtype_name == str(dtype).rpartition(".")[2]
    assert vllm_model(policy, tiny.config(tmp_path, bf16=True)).dtype == torch.bfloat16


def test_arguments_that_say_which_files_are_passed_on(folder, tmp_path):
    given = {"revision": "main", "trust_remote_code": False, "code_revision": None, "dtype": "float32"}
    found = vllm_model(loaded(folder), tiny.config(tmp_path, model_init_kwargs=given))
    assert found.init_kwargs == {"revision": "main", "trust_remote_code": False}


def test_quantised_files_are_noticed(folder, args, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.four_bit(tmp_path / "from")
    model.save_pretrained(tmp_path / "four")
    assert not vllm_model(get_peft_model(model, tiny.lora()), args).quantized, "the files are full"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    found = vllm_model(get_peft_model(again, tiny.lora()), args)
    assert found.quantized and found.dtype == torch.float32


def test_a_model_without_files_is_an_error(args, tmp_path):
    with pytest.raises(
        ModelError, match="`model` got a LlamaForCausalLM that was not loaded from files.*save_pretrained"
    ):
        vllm_model(tiny.llama(), args)
    gone = saved(tmp_path / "gone")
    policy = loaded(gone)
    (gone / "config.json").unlink()
    with pytest.raises(
        ModelError, match=f"`model` got a LlamaForCausalLM that was loaded from '{gone}'; use_vllm=True needs"
    ):
        vllm_model(policy, args)


def test_a_dtype_that_vllm_has_not_is_an_error(folder, args):
    with pytest.raises(ModelError, match="`model` computes in torch.float64; vLLM in float32, bfloat16 or float16"):
        vllm_model(loaded(folder).double(), args)


def test_a_policy_whose_weights_cannot_be_sent_is_an_error(folder, args, monkeypatch):
    def reject(policy: Any) -> None:
        raise ModelError("cannot be merged")

    monkeypatch.setattr(module, "check_mergeable", reject)
    with pytest.raises(ModelError, match="cannot be merged"):
        vllm_model(loaded(folder), args)
