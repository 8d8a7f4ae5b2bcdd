"""LoRA's forward pass in fewer operations.

PEFT copies the base layer's result, multiplies the whole of the adapter's by the scaling, adds, and looks at many options
on the way. Here the scaling goes into the product's narrow middle, and the second product adds into the result. The numbers
are the same up to rounding; sampling token by token, where a call costs more than its arithmetic, gains most.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers around a linear map; one around a parameter of a module, as of a mixture's router, is another thing."""


def shorten(model: nn.Module) -> None:
    """Give every LoRA layer of linear maps the shorter pass; those it does not fit keep PEFT's."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or type(module).__name__ not in _LINEAR:
            continue
        if all(type(a) is nn.Linear for a in module.lora_A.values()):
            module.__class__ = _shortened(type(module))


@cache
def _shortened(layer: type) -> type:
    """A subclass, so that a layer stays what PEFT takes it for, and can be copied."""
    if "_trustkl_shortened" in layer.__dict__:
        return layer

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _plain_adapter(self)
        if name is None:
            return layer.forward(self, x, *args, **kwargs)
        result = self.base_layer(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        middle = functional.linear(x, down) * self.scaling[name]
        if result.dtype != middle.dtype:
            return result + functional.linear(middle, up).to(result.dtype)
        wide = result.shape
        return torch.addmm(result.reshape(-1, wide[-1]), middle.reshape(-1, middle.shape[-1]), up.t()).view(wide)

    return type(
        layer.__name__, (layer,), {"forward": forward, "_trustkl_shortened": True, "__module__": layer.__module__}
    )


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter, where it is LoRA without variants, biases or dropout; None leaves the pass to PEFT."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    if name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    return name if isinstance(dropout, nn.Identity) or not dropout.p else None
