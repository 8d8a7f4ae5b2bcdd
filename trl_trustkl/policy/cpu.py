"""Conveniences for CPUs: whether bf16 is fast, the kernel of attention, 4-bit weights that are dequantised once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .quantization import dequantised

SHORT = 128
"""Up to this many tokens, attention from plain matrix products is faster in bf16 on a CPU than the fused kernel, whose
backward pass is slow."""


def computes_bf16() -> bool:
    """Whether the GPU, or the CPU where there is none, has bf16 instructions."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_bf16_instructions()


def has_bf16_instructions() -> bool:
    """Whether torch uses this CPU's bf16 instructions; without them, bf16 is slower than float32.

    With the environment variable ATEN_CPU_CAPABILITY=avx2 it does not.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    try:
        return " avx512_bf16 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def attention_kernel(input_ids: Tensor) -> AbstractContextManager[Any]:
    """A context with the faster attention kernel for a forward pass over these tokens, and its backward pass."""
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if input_ids.device.type == "cpu" and bf16 and input_ids.shape[1] <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def dequantised_on_cpu(model: nn.Module) -> Iterator[None]:
    """Dequantise 4-bit weights on a CPU once for all passes inside the context, rather than in every pass.

    This is for sampling, which keeps no activations. It takes two bytes per weight in bf16. Weights on a GPU are left
    to its kernels.
    """
    # PEFT's wrappers around these layers have the same class name, but no `compute_dtype`.
    named = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and "compute_dtype" in vars(m)]
    layers = [m for m in named if m.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = _dequantised_forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dequantised_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    weight = dequantised(layer)
    assert weight is not None
    bias = layer.bias

    def forward(x: Tensor) -> Tensor:
        dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)).to(x.dtype)

    return forward
