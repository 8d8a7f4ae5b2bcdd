"""The policy's weights as a plain checkpoint: a fresh base model that loads them computes as the policy."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, PromptTuningConfig
from peft.tuners.lora import Linear
from torch import nn

from tests import families, tiny
from tests.adapters import KINDS, Build, adapted, assert_plain_model_is, four_bit, moved, tied
from trl_trustkl.errors import ModelError
from trl_trustkl.policy import merged_weights as module
from trl_trustkl.policy.merged_weights import check_mergeable, merged_weights
from trl_trustkl.policy.reference import REFERENCE_ADAPTER, clone_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

# -- the plain model computes as the policy ----------------------------------------------------------------------------

FAMILIES: dict[str, Build] = tiny.FAMILIES | {name: lambda name=name: families.build(name) for name in ("OPT", "Bloom")}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_sends_every_parameter(family):
    build = FAMILIES[family]
    assert_plain_model_is(moved(build().double()), build().double(), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_adapter_is_merged_in_any_family(family):
    build = FAMILIES[family]
    assert_plain_model_is(adapted(build().double(), tiny.lora()), build().double(), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged(kind):
    build, config = KINDS[kind]
    assert_plain_model_is(adapted(build().double(), config), build().double(), atol=1e-11)


@pytest.mark.parametrize("kind", ["DoRA", "embeddings", "complete modules", "tokens", "IA3", "tied, both complete"])
def test_an_adapter_that_is_not_active_is_not_merged(kind):
    build, config = KINDS[kind]
    policy = adapted(build().double(), config)
    alone = dict(merged_weights(policy))
    clone_adapter(policy, "default", REFERENCE_ADAPTER)
    moved(policy.double(), seed=4, adapter=REFERENCE_ADAPTER)
    together = dict(merged_weights(policy))
    assert list(alone) == list(together) and all(torch.equal(alone[name], together[name]) for name in alone)
    assert_plain_model_is(policy, build().double(), atol=1e-11)


def test_a_layer_that_only_an_inactive_adapter_has_is_the_base_models():
    policy = adapted(tied().double(), tiny.lora(target_modules=["q_proj"]))
    policy.add_adapter("other", tiny.lora(target_modules=["v_proj", "embed_tokens"], modules_to_save=["norm"]))
    moved(policy.double(), adapter="other")
    policy.set_adapter("default")
    assert_plain_model_is(policy, tied().double(), atol=1e-12)


@pytest.mark.parametrize("name", ["Qwen3", "GPTNeoX", "Phi"])  # lm_head, embed_out, and a head with a bias
def test_a_tied_head_is_sent_under_its_name(name):
    policy = moved(families.build(name, tie_word_embeddings=True))
    head, embedding = (
        next(f"{name}.weight" for name, each in policy.named_modules() if each is wanted)
        for wanted in (policy.get_output_embeddings(), policy.get_input_embeddings())
    )
    check_mergeable(policy)
    weights = dict(merged_weights(policy))
    assert head not in dict(policy.named_parameters()) and torch.equal(weights[head], weights[embedding])


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_the_sum_is_rounded_once(dtype):
    policy = adapted(tiny.llama().bfloat16(), tiny.lora())
    weights = dict(merged_weights(policy, dtype))
    layers = {n: m for n, m in policy.get_base_model().named_modules() if isinstance(m, Linear)}
    assert len(layers) == 14 and {weight.dtype for weight in weights.values()} == {dtype or torch.bfloat16}
    for name, layer in layers.items():
        down, up = (each["default"].weight.detach().float() for each in (layer.lora_A, layer.lora_B))
        wanted = layer.base_layer.weight.float() + 2.0 * (up @ down)
        assert torch.equal(weights[f"{name}.weight"], wanted.to(dtype or torch.bfloat16))


# -- one layer at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoRA", "4 bits"])
def test_one_layer_is_copied_at_a_time_and_only_when_its_weights_are_requested(tmp_path, monkeypatch, kind):
    config = tiny.lora(target_modules=["q_proj", "k_proj"])  # neighbours: one copy follows the other
    policy = adapted(tiny.llama() if kind == "LoRA" else four_bit(tmp_path), config)
    copies: list[list[weakref.ref]] = []

    def alive() -> int:
        return sum(any(ref() is not None for ref in refs) for refs in copies)

    def deepcopy(value: Any, *memo: Any) -> Any:
        assert alive() == 0, "the copy before is still in memory"
        copied = copy.deepcopy(value, *memo)
        if isinstance(copied, module.BaseTunerLayer):
            base = copied.get_base_layer()
            copies.append([weakref.ref(each) for each in (copied, base, base.weight)])
        return copied

    copy = module.copy
    monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=deepcopy))
    weights: Iterator[Any] = merged_weights(policy)
    firsts, count = [], 0
    assert not copies
    while name := next(weights, [None])[0]:
        assert alive() <= 1
        if len(copies) > count:
            count += 1
            firsts.append(name)
            assert len(copies) == count
    assert firsts == [f"model.layers.{i}.self_attn.{each}_proj.weight" for i in range(2) for each in "qk"]
    assert alive() == 0


# -- what cannot be sent -----------------------------------------------------------------------------------------------


def other_quantisation() -> Any:
    model = tiny.llama()
    model.quantization_method = "gptq"
    return model


def x_lora() -> Any:
    policy = tiny.tuned()
    policy.peft_config["default"].peft_type = "XLORA"
    return policy


def untied() -> Any:
    model = tied()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
ADAPTION = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
REFUSED: dict[str, tuple[Build, str]] = {
    "prompt learning": (lambda: adapted(tiny.llama(), PROMPT), "'default' has type PromptTuningConfig, .* Use LoRA"),
    "adaption prompt": (lambda: adapted(tiny.llama(), ADAPTION), "has type AdaptionPromptConfig, which changes"),
    "X-LoRA": (x_lora, "has type LoraConfig, which changes"),
    "other layers": (
        lambda: adapted(tiny.llama(), tiny.lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])),
        r"layer_replication=\[\[0, 2\], \[1, 2\]\].* Leave it None",
    ),
    "another quantisation": (other_quantisation, "quantised by 'gptq'; .* 'bitsandbytes'"),
    "a bias that the base model lacks": (
        lambda: adapted(tiny.llama(), tiny.lora(lora_bias=True)),
        "layer 'model.layers.0.self_attn.q_proj', a peft.tuners.lora.layer.Linear, .*no bias.* Use LoRA without",
    ),
    "activated LoRA": (
        lambda: adapted(tiny.llama(), tiny.lora(alora_invocation_tokens=[1])),
        "cannot merge .NotImplementedError: aLoRA",
    ),
    "tied, the embedding adapted": (
        lambda: adapted(tied(), tiny.lora(target_modules=["embed_tokens"])),
        "tie_word_embeddings` got True, .*ensure_weight_tying=True",
    ),
    "tied, the head adapted": (lambda: adapted(tied(), tiny.lora(target_modules=["lm_head"])), "tie_word_embeddings"),
    "tied, a complete head": (lambda: adapted(tied(), tiny.lora(modules_to_save=["lm_head"])), "tie_word_embeddings"),
    "tied, different DoRA": (
        lambda: adapted(tied(), tiny.lora(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)),
        "tie_word_embeddings",
    ),
    "tied by the configuration alone": (untied, "are different weights"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sent_is_refused(kind):
    build, message = REFUSED[kind]
    policy = build()
    with pytest.raises(ModelError, match=message):
        check_mergeable(policy)


def test_running_out_of_memory_is_not_called_a_defect_of_the_model(monkeypatch):
    def full(layer: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Linear, "merge", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        check_mergeable(tiny.tuned())
