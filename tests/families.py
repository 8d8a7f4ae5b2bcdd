"""Tiny models of many architectures, each with the settings that it needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests import tiny

COMMON = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2,
    # A padding token that is sampled has an embedding of exactly 0, from which a Gemma moves in jumps.
    "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
WIDTH = {"intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
ATTENTION = HEADS | {"num_key_value_heads": 2}
USUAL = WIDTH | ATTENTION

MOE = USUAL | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Qwen3": USUAL | {"head_dim": 8},
    "Gemma3Text": USUAL | {
        "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GPTNeoX": WIDTH | HEADS,
    "Phi": USUAL,
    "Mistral": USUAL | {"sliding_window": 4},
    "OPT": ATTENTION | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "Bloom": USUAL | {"n_layer": 2, "n_head": 4},
    "Falcon": WIDTH | HEADS | {"alibi": True},
    "Granite": USUAL | {"logits_scaling": 3.0},
    "Cohere": USUAL | {"logit_scale": 0.4},
    "Olmo2": USUAL,
    "Mixtral": MOE,
    "Qwen3Moe": MOE | {"head_dim": 8, "moe_intermediate_size": 16},
}  # fmt: skip
"""Architectures of attention layers."""

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
RECURRENT: dict[str, dict[str, Any]] = {
    "Mamba": WIDTH | {"state_size": 4},
    "Mamba2": WIDTH | {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8},
    "Jamba": USUAL | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "FalconH1": USUAL | SSM | {"mamba_d_ssm": 64},
    "Lfm2": USUAL | {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": USUAL | EXPERTS | HYBRID | DELTA | {"moe_intermediate_size": 16},
    "Rwkv": WIDTH | {"attention_hidden_size": 32},
    "RecurrentGemma": USUAL | {"block_types": ["recurrent", "attention"], "lru_width": 32, "head_dim": 8},
    "MiniMax": USUAL | EXPERTS | HYBRID | {"block_size": 8},
}
"""Architectures with recurrent layers."""

NOISE: dict[str, dict[str, Any]] = {
    "Mixtral": {"router_jitter_noise": 0.3},
    "OPT": {"layerdrop": 0.9},
    "Falcon": {"hidden_dropout": 0.3},  # read from the configuration in every pass
}
"""Settings that make a forward pass in training random."""


def build(name: str, **changes: Any) -> Any:
    """A causal language model of this architecture; `changes` go to its configuration."""
    settings = COMMON | (TRANSFORMERS | RECURRENT)[name] | changes
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))


FOUR: dict[str, Any] = tiny.FAMILIES | {"qwen3": lambda: build("Qwen3")}
"""Builders of four families of attention layers."""
