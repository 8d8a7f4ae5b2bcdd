"""Quantised models: what bitsandbytes' 4-bit weights need on a CPU before they are trained, and while they are sampled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def unpack_4bit_weights(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights for CPU inference.

    A forward pass in eval mode packs them on CPUs with AVX512-BF16, and the packed kernel has no gradient: training such
    a model would silently leave most of its adapter where it was.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, state
            )


@contextmanager
def dequantised_on_cpu(model: nn.Module) -> Iterator[None]:
    """Multiply by the same weights, written out once in the compute type, where a CPU would do so again for every token.

    For sampling, when there are no activations to keep; it takes two bytes a weight in bf16. Leaves a GPU to its kernels.
    """
    # PEFT's layers around them have the same name, and no compute type.
    named = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and "compute_dtype" in vars(m)]
    layers = [m for m in named if m.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = _plain_product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain_product(layer: Any) -> Callable[[Tensor], Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    bias = layer.bias

    def product(x: Tensor) -> Tensor:
        dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)).to(x.dtype)

    return product
