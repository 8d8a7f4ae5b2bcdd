"""Policies with adapters of many kinds, in full and quantised weights, whose adapters change what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraModel
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig

from tests import families, tiny
from trl_trustkl.policy.dropout import disable_dropout
from trl_trustkl.policy.merged_weights import check_mergeable, merged_weights

IDS = torch.arange(1, 13).view(2, 6)
Build = Callable[[], Any]


def moved(policy: Any, seed: int = 3, *, adapter: str = "") -> Any:
    """The policy as in a trainer, with noise on what is trained, or on the weights of `adapter`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if adapter in name.split(".") if adapter else weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(weight))
    disable_dropout(policy)
    return policy.train()


def adapted(model: Any, config: PeftConfig) -> Any:
    """The model with an adapter that changes it; a model in float64 has an adapter in float64."""
    policy = get_peft_model(model, config)
    return moved(policy.double() if model.dtype == torch.float64 else policy)


def logits(model: Any) -> torch.Tensor:
    """The logits of two sequences of 6 tokens, [2, 6, V]."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def assert_plain_model_is(policy: Any, plain: Any, atol: float) -> None:
    """`plain`, a base model with other weights, loads the policy's weights, by which it gets the policy's logits."""
    check_mergeable(policy)
    weights = dict(merged_weights(policy))
    assert list(weights) == [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    assert not any(weight.requires_grad for weight in weights.values())
    disable_dropout(plain)
    start, wanted = logits(plain.train()), logits(policy)
    plain.load_state_dict(weights, strict=not list(plain.buffers()))
    torch.testing.assert_close(logits(plain), wanted, rtol=0, atol=atol)
    assert (wanted - start).abs().max() > 0.1


def tied(**changes: Any) -> Any:
    return tiny.llama(tie_word_embeddings=True, **changes)


def biased() -> Any:
    return tiny.llama(attention_bias=True, mlp_bias=True)


def mixture() -> Any:
    return families.build("Mixtral", experts_implementation="eager")


SOME = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[Build, PeftConfig]] = {
    "all biases": (biased, tiny.lora(bias="all")),
    "biases of adapted layers": (biased, tiny.lora(bias="lora_only", target_modules=["q_proj"])),
    "a bias of the adapter": (biased, tiny.lora(lora_bias=True, target_modules=["q_proj", "down_proj"])),
    "Conv1D with a bias of the adapter": (tiny.gpt2, tiny.lora(lora_bias=True, target_modules=["c_attn", "c_proj"])),
    "DoRA": (tiny.llama, tiny.lora(use_dora=True)),
    "DoRA of Conv1D": (tiny.gpt2, tiny.lora(use_dora=True)),
    "DoRA of embeddings": (tiny.llama, tiny.lora(use_dora=True, target_modules=["embed_tokens", "lm_head"])),
    "ranks": (tiny.llama, tiny.lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "embeddings": (tiny.llama, tiny.lora(target_modules=["embed_tokens", "q_proj"])),
    "complete modules": (tiny.llama, tiny.lora(modules_to_save=["lm_head", "embed_tokens"])),
    "tokens": (tiny.llama, tiny.lora(trainable_token_indices=[5, 6])),
    "tokens alone": (tiny.llama, TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 6])),
    "parameters": (mixture, tiny.lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "a parameter around adapted layers": (
        lambda: families.build("Mamba"),
        tiny.lora(target_modules=["x_proj", "in_proj"], target_parameters=["mixer.A_log"]),
    ),
    "IA3": (biased, IA3Config(**SOME, feedforward_modules=["down_proj"])),
    "OFT": (tiny.llama, OFTConfig(**SOME, r=0, oft_block_size=8)),
    "LoHa": (tiny.llama, LoHaConfig(**SOME, r=4)),
    "norms": (tiny.llama, LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM")),
    "tied, neither adapted": (tied, tiny.lora()),
    "tied, both complete": (tied, tiny.lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied tokens": (tied, tiny.lora(trainable_token_indices=[5, 6])),
}
if "_add_targets_to_tie" in vars(LoraModel):  # older versions of PEFT adapt only one of the two
    BOTH = tiny.lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    KINDS["tied, both adapted"] = (tied, BOTH)


def four_bit(folder: Any, model: Any = None, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The model with NF4 weights, quantised from `dtype`, that computes in float32; its full weights are in `folder`."""
    model = tiny.llama(hidden_size=64, intermediate_size=128, attention_bias=True) if model is None else model
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    model.save_pretrained(folder)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | settings
    quantization = BitsAndBytesConfig(**settings)
    return type(model).from_pretrained(folder, quantization_config=quantization, dtype=dtype)


def plain(folder: Any, policy: Any) -> Any:
    """The base model of the policy with the full weights that `four_bit` saved."""
    return type(policy.get_base_model()).from_pretrained(folder)


def pack(policy: Any) -> None:
    """Pack the 4-bit weights as a pass in eval mode does on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for layer in policy.modules():
        weight = getattr(layer, "weight", None)
        if getattr(weight, "quant_state", None) is not None and not isinstance(layer, Linear4bit):
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
