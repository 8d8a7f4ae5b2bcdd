"""What a CPU computes well: float32 where it has no instructions for bf16, 4-bit weights written out before sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def computes_bf16() -> bool:
    """Whether the GPU, or without one the CPU, multiplies bf16 itself."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_bf16_instructions()


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 itself; on one that does not, bf16 is slower than float32."""
    try:
        return " avx512_bf16 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


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
