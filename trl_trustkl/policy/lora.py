"""LoRA's forward pass in fewer operations.

PEFT casts the weights of every adapter in every layer under autocast, copies the result of the base layer, scales the product
of the adapter, adds the two, and checks many options on the way. Here the weights of all adapters are cast and scaled at once
before the pass, and the second product is added to the base layer's result. The numbers are the same up to rounding, and the
same bit for bit in all passes here. This matters wherever the overhead of a call exceeds its arithmetic: on a GPU, and when
sampling token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's layers around a linear map. A LoRA layer around a parameter, as of a mixture's router, is not one of them."""


def linear_layers(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers of `model` that `short_forward` supports."""
    found = [m for m in model.modules() if isinstance(m, LoraLayer) and type(m).__name__ in _LINEAR]
    return [layer for layer in found if all(type(a) is nn.Linear for a in layer.lora_A.values())]


@contextmanager
def short_forward(layers: Sequence[LoraLayer], buffers: list[Tensor] | None = None) -> Iterator[None]:
    """Replace the layers' forward pass by the shorter one inside the context, with the adapters' weights of its beginning.

    The weights are cast to the dtype of the autocast that is on at the beginning. Without gradients they are written into
    `buffers`, which an empty list becomes: a compiled or captured pass finds them in the same place in the next context.

    Do not use it with gradient checkpointing: the backward pass, outside of the context, would recompute with PEFT's
    operations.
    """
    named = [(layer, _plain_adapter(layer)) for layer in layers if "forward" not in vars(layer)]
    changed = [(layer, name) for layer, name in named if name is not None]
    downs = [layer.lora_A[name].weight for layer, name in changed]
    ups = [layer.lora_B[name].weight for layer, name in changed]
    scales = [1.0] * len(downs) + [float(layer.scaling[name]) for layer, name in changed]
    ready = _ready_weights([*downs, *ups], scales, buffers)
    for (layer, _), down, up in zip(changed, ready, ready[len(downs) :], strict=False):
        vars(layer)["forward"] = partial(_forward, layer, down, up)
    try:
        yield
    finally:
        for layer, _ in changed:
            del vars(layer)["forward"]


def _forward(layer: LoraLayer, down: Tensor, up: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`down` [r, in] and `up` [out, r], which includes the scaling, in the dtype of the pass."""
    if args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    middle = functional.linear(x.to(down.dtype), down)
    if result.dtype != middle.dtype:
        return result + functional.linear(middle, up).to(result.dtype)
    wide = result.shape
    return torch.addmm(result.reshape(-1, wide[-1]), middle.reshape(-1, middle.shape[-1]), up.t()).view(wide)


def _plain_adapter(layer: LoraLayer) -> str | None:
    """The active adapter, if it is the only one and has no variant, bias or dropout; otherwise None, for PEFT's pass."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    if name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    return name if isinstance(dropout, nn.Identity) or not dropout.p else None


def _ready_weights(weights: list[Tensor], scales: list[float], buffers: list[Tensor] | None) -> Sequence[Tensor]:
    """The weights times their scales, in the dtype in which autocast would use them."""
    dtypes = [_dtype_in_pass(weight) for weight in weights]
    if all(scale == 1.0 for scale in scales) and all(w.dtype == d for w, d in zip(weights, dtypes, strict=True)):
        return weights
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _ScaledAndCast.apply(scales, dtypes, *weights)  # type: ignore[no-untyped-call, no-any-return]
    with torch.no_grad():
        found = _scaled_and_cast(weights, scales, dtypes)
        if buffers is None:
            return found
        if [(b.shape, b.dtype, b.device) for b in buffers] != [(w.shape, w.dtype, w.device) for w in found]:
            buffers[:] = [each.clone() for each in found]  # an entry may be a weight itself
        else:
            torch._foreach_copy_(buffers, found)
    return buffers


def _dtype_in_pass(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class _ScaledAndCast(torch.autograd.Function):
    """`_scaled_and_cast` of all weights at once, with the gradients of all of them at once."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], dtypes: list[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.scales, ctx.dtypes = scales, [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(_scaled_and_cast(weights, scales, dtypes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {i: g for i, g in enumerate(gradients) if g is not None and ctx.needs_input_grad[2 + i]}
        wide = _cast(list(given.values()), [ctx.dtypes[i] for i in given])
        found = dict(zip(given, _scaled(wide, [ctx.scales[i] for i in given]), strict=True))
        return None, None, *(found.get(i) for i in range(len(gradients)))


def _scaled_and_cast(weights: Sequence[Tensor], scales: list[float], dtypes: list[torch.dtype]) -> list[Tensor]:
    return _cast(_scaled(weights, scales), dtypes)


def _scaled(tensors: Sequence[Tensor], scales: list[float]) -> list[Tensor]:
    """Each tensor times its scale, in few launches; those of scale 1 themselves."""
    found = list(tensors)
    some = [i for i, scale in enumerate(scales) if scale != 1.0]
    if some:
        products = torch._foreach_mul([found[i] for i in some], [scales[i] for i in some])
        for i, product in zip(some, products, strict=True):
            found[i] = product
    return found


def _cast(tensors: Sequence[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Copies in these dtypes, in few launches; a tensor that has its dtype itself."""
    found = list(tensors)
    some = [i for i, dtype in enumerate(dtypes) if found[i].dtype != dtype]
    copies = [torch.empty_like(found[i], dtype=dtypes[i]) for i in some]
    if some:
        torch._foreach_copy_(copies, [found[i] for i in some])
    for i, copy in zip(some, copies, strict=True):
        found[i] = copy
    return found
