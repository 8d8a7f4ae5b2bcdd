"""Quantised models: their weights dequantised, and what 4-bit weights need on a CPU before they are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def unpack_4bit_weights(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights for CPU inference; other weights are left as they are.

    A forward pass in eval mode packs them on CPUs with AVX512-BF16, and the packed kernel has no gradient: most of the
    adapter of such a model would silently not be trained.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _unpacked(weight.data, state)


def ready_to_train(model: nn.Module) -> None:
    """Put the model in train mode, and unpack its weights: a callback, or a pass before the training, may have left it in eval
    mode."""
    model.train()
    unpack_4bit_weights(model)


def is_8bit(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_8bit", False))


def _state_of(layer: Any, weight: Any) -> Any:
    """bitsandbytes' state of a 4-bit weight; FSDP2 makes another tensor of the weight, and the layer keeps the state."""
    state = getattr(weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Packed 4-bit weights and their state as they were before; `state` itself is changed."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    if not state.nested:  # the inverse leaves the scales as packing transposed them
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def dequantised_dtype(layer: nn.Module, name: str) -> torch.dtype:
    """The dtype of a parameter of `layer`, or of what `dequantised` makes of it if bitsandbytes has quantised it."""
    weight: Tensor = getattr(layer, name)
    state = _state_of(layer, weight) if name == "weight" else None
    if state is not None:
        dtype: torch.dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
        return dtype
    return weight.dtype if weight.is_floating_point() else torch.float32


@torch.no_grad()
def dequantised(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer that bitsandbytes has quantised; None for any other module.

    A 4-bit weight is in the dtype from which it was quantised, as in the forward pass in train mode; an 8-bit weight is in
    float32. The layer is left as it is.
    """
    weight: Any = getattr(layer, "weight", None)
    state = _state_of(layer, weight)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        data = weight.data
        if getattr(state, "packing_format_for_cpu", False):
            data, state = _unpacked(data, copy.copy(state))
        return dequantize_4bit(data, state)
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        held: Any = layer
        # The first forward pass moves the scales from the weight to the layer's state.
        scales = held.state.SCB if weight.SCB is None else weight.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return None
