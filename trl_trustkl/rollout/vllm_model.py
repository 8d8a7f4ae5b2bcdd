"""What a vLLM engine needs to know of the policy: the files to load it from, and the dtype to compute in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..errors import ModelError
from ..policy.loading import without_adapter
from ..policy.merged_weights import check_mergeable
from ..policy.precision import sampling_dtype


class VLLMModel(NamedTuple):
    """name: the folder or the Hub's name of the base model. dtype: that in which the trainer computes. vocabulary: the policy's
    tokens. init_kwargs: the revision and whether the repository's code may run. quantized: whether the files are quantised, so
    that only their configuration can be used: vLLM gets dequantised weights."""

    name: str
    dtype: torch.dtype
    vocabulary: int
    init_kwargs: dict[str, Any]
    quantized: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def vllm_model(policy: PreTrainedModel | PeftModel, args: Any) -> VLLMModel:
    """The base model of the policy. Raises ModelError for one that vLLM cannot load, or whose weights cannot be sent."""
    causal = without_adapter(policy)
    check_mergeable(policy)
    if not causal.name_or_path:
        raise ModelError(
            f"`model` got a {type(causal).__name__} that was not loaded from files, and use_vllm=True needs them; save it with "
            "save_pretrained(folder), together with its tokenizer, and load it with from_pretrained(folder)."
        )
    dtype = sampling_dtype(causal, args)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"`model` computes in {dtype}; vLLM in float32, bfloat16 or float16: load it in one of these.")
    given = args.arguments("model_init_kwargs")
    kept = {
        name: given[name] for name in ("revision", "code_revision", "trust_remote_code") if given.get(name) is not None
    }
    try:
        config = AutoConfig.from_pretrained(causal.name_or_path, **kept)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model` got a {type(causal).__name__} that was loaded from {causal.name_or_path!r}; use_vllm=True needs its "
            f"files there, and they cannot be read: {error}"
        ) from error
    return VLLMModel(
        causal.name_or_path, dtype, causal.get_input_embeddings().weight.shape[0], kept,
        quantized=getattr(config, "quantization_config", None) is not None,
    )  # fmt: skip
