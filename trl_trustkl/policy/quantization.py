"""Quantised models, and what bitsandbytes' 4-bit weights need on a CPU before they are trained."""

from __future__ import annotations

from typing import Any

from torch import nn


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
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
            if not weight.quant_state.nested:  # the inverse leaves the scales as packing transposed them
                weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
