"""The policy's weights as a plain checkpoint of its base model has them, for a rollout engine without PEFT or bitsandbytes.

PEFT merges an adapter into the model itself. That rounds the weights of the model, in 4 bits by far more than an update
changes them, and an error leaves the adapter merged. Here each layer is merged in a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, shown
from ..parallel.sharding import REPLICATED, Replicated
from .loading import without_adapter
from .quantization import dequantised, dequantised_dtype

_OWN_WEIGHTS = "sample with the policy itself instead of an engine that needs its weights."


def merged_weights(
    policy: PreTrainedModel | PeftModel, dtype: torch.dtype | None = None, sharding: Replicated = REPLICATED
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the policy by the names of the base model's parameters, with the active adapter merged.

    The names are those of `named_parameters()` before PEFT wrapped the model, in the order of the modules. A parameter that
    has several names, such as that of tied embeddings, comes under each of them. Weights that bitsandbytes has quantised are
    dequantised. Sums are computed in float32 or higher precision, and rounded once, to `dtype`; None: to that of the
    parameter, for a 4-bit weight to that from which it was quantised, and for an 8-bit weight to float32.

    Nothing is computed before it is requested, and at most one copy of a layer exists at a time. The policy is never
    changed. The tensors are detached and on the devices of the parameters; those that nothing was added to share the
    policy's memory and must not be changed in place. `check_mergeable` says whether the result is complete.

    With `sharding`, all processes request the weights together. One layer is gathered at a time, and each tensor is a copy.
    """
    model = without_adapter(policy)
    return _weights(model, dtype, sharding, "")


def _weights(
    module: nn.Module, dtype: torch.dtype | None, sharding: Replicated, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """The weights of `module` by their names without PEFT's wrappers."""
    with sharding.holding(module):
        base, merged = _unmerged(module), _merged(module)
        for name, weight in merged.named_parameters(recurse=False, remove_duplicate=False):
            wanted = dtype or dequantised_dtype(base, name)
            yield f"{prefix}{name}", weight.detach().to(wanted, copy=sharding.shards_weights)
            del weight  # it would keep a copy of its layer's weight while the next layer is copied
        children = list(merged.named_children())
        del merged, base
        for name, child in children:
            yield from _weights(child, dtype, sharding, f"{prefix}{name}.")


def check_mergeable(policy: PreTrainedModel | PeftModel) -> None:
    """ModelError if `merged_weights` would not give a plain checkpoint that computes as the policy.

    This merges every adapted layer once, in a copy, since PEFT does not say in advance which layers it cannot merge.
    """
    model = without_adapter(policy)
    method = getattr(model, "quantization_method", None)
    if method is not None and method != "bitsandbytes":
        raise ModelError(
            f"`model` is quantised by {shown(getattr(method, 'value', method))}; weights can be sent to an engine if they are "
            f"not quantised, or by 'bitsandbytes'. Load it without this quantisation, or {_OWN_WEIGHTS}"
        )
    inactive: set[str] = set()
    if isinstance(policy, PeftModel):
        inactive = set(policy.peft_config) - set(policy.active_adapters)
        for adapter, config in policy.peft_config.items():
            _check_method(adapter, config, adapter in inactive)
    _check_ties(model, inactive)
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            try:
                _merged(layer)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:
                raise ModelError(
                    f"`model` has the adapted layer {name!r}, a {type(layer).__module__}.{type(layer).__name__}, which PEFT "
                    f"cannot merge ({type(error).__name__}: {error}). Use LoRA without `lora_bias`, or {_OWN_WEIGHTS}"
                ) from error


def _check_method(adapter: str, config: Any, inactive: bool) -> None:
    """ModelError for an adapter that is more than changes of the weights of the base model's layers."""
    if getattr(config, "layer_replication", None):
        raise ModelError(
            f"`peft_config` of the adapter {adapter!r} has layer_replication={shown(config.layer_replication)}: the base model "
            f"has other layers than its checkpoint. Leave it None, or {_OWN_WEIGHTS}"
        )
    if not inactive and (config.is_prompt_learning or config.is_adaption_prompt or config.peft_type == "XLORA"):
        raise ModelError(
            f"`peft_config` of the adapter {adapter!r} has type {type(config).__name__}, which changes the model's inputs or "
            f"its computation instead of its weights. Use LoRA or another adapter of the weights, or {_OWN_WEIGHTS}"
        )


def _check_ties(model: PreTrainedModel, inactive: set[str]) -> None:
    """ModelError if the configuration ties the embeddings, but they are different weights or have different adapters."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return

    def memory(module: nn.Module) -> set[int]:
        """Where the module's weights and those of its active adapter are, without biases, which are not tied."""
        names = ((name.split("."), weight) for name, weight in module.named_parameters())
        weights = [weight for name, weight in names if name[-1] != "bias" and inactive.isdisjoint(name)]
        return {weight.untyped_storage().data_ptr() for weight in weights}

    if memory(model.get_input_embeddings()) != memory(head):
        raise ModelError(
            "`model.config.tie_word_embeddings` got True, but the input embedding and the output head are different weights "
            "or have different adapters, and an engine would use one weight for both. Adapt both with "
            "LoraConfig(ensure_weight_tying=True), or neither; or untie them in the base model's checkpoint: load it with "
            "tie_word_embeddings=False, copy the embedding's weight to the head, and save it."
        )


def _unmerged(module: nn.Module) -> nn.Module:
    """The base model's module inside of PEFT's wrappers, without a copy."""
    module = _in_use(module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@torch.no_grad()
def _merged(module: nn.Module) -> nn.Module:
    """A module with plain weights that computes what `module` computes: a copy if `module` is adapted or quantised.

    The weights of an adapted layer come in float32, or in float64 if they were. Raises what PEFT raises for a layer that it
    cannot merge.
    """
    module, base = _in_use(module), _unmerged(module)
    adapted = isinstance(module, BaseTunerLayer)
    weight = dequantised(base)
    if weight is None:
        return _merge(_copy(module)) if adapted else module
    linear = _linear(weight, base)
    if adapted:
        _merge_plainly(_copy(module, {id(base): linear}))
    if issubclass(getattr(base, "source_cls", nn.Linear), Conv1D):  # its weight was transposed to be quantised
        linear.weight.data = linear.weight.data.T.contiguous()
    return linear


def _copy(layer: nn.Module, replacements: Mapping[int, Any] | None = None) -> Any:
    """A copy of an adapted layer with weights in float32 or higher precision; `replacements` of its parts by their `id`."""
    # PEFT keeps some tensors with their history, which cannot be copied: of a tied head, views of the embedding's adapter.
    kept = [*layer.buffers(), *(getattr(layer, "kwargs", {}).get("tied_adapter") or {}).values()]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    copied = copy.deepcopy(layer, memo | dict(replacements or {}))
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
    return copied


def _merge(layer: Any) -> nn.Module:
    """The base layer of an adapted layer, with the active adapter merged into it."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        base: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return base
    layer.merge()
    return layer.get_base_layer()


def _merge_plainly(layer: Any) -> None:
    """Merge the active adapter of a layer of PEFT's for quantised weights into a base layer that is not quantised."""
    if type(layer).__module__ == "peft.tuners.lora.bnb":
        Linear.merge(layer)  # the layer's class replaces this method by one that writes quantised weights
    elif getattr(layer, "quantization_backend", None) is not None:
        layer.quantization_backend = None  # which writes quantised weights
        layer.merge()
    else:
        raise NotImplementedError("it merges only into quantised weights")


def _in_use(module: nn.Module) -> nn.Module:
    """The module that a wrapper of PEFT's for modules outside of adapted layers calls; any other module itself."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter
    if isinstance(module, ModulesToSaveWrapper):
        for active in module.active_adapters:
            if active in module.modules_to_save:
                return module.modules_to_save[active]
        return module.original_module
    return module


def _linear(weight: Tensor, layer: Any) -> nn.Linear:
    """A linear layer with this weight [out, in] and a copy of the bias of `layer`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = copy.deepcopy(layer.bias)
    return linear
