"""What a compiled decoding pass depends on, kept the same from batch to batch and from update to update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

STEP = 128
"""The length of a static cache is a multiple of it, so that prompts of other lengths rarely need another cache."""


class StaticDecoding:
    """Keeps the number of rows, the cache and the replaced forward methods of a model that decodes with a static cache.

    torch.compile makes the pass again for a tensor of another shape or a function that is another object, and a CUDA graph
    is captured again for a cache at another address. So there is one cache. It grows with the rows and the prompts, and
    stays in memory until `release`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rows = self._length = 0
        self._cache: Any = None
        self._forwards: dict[nn.Module, Any] = {}

    def rows(self, count: int) -> list[int]:
        """Indices of the prompts to sample from: each of `count`, and the first again for as many rows as there were before.

        With the same random numbers, its copies end where it ends.
        """
        self._rows = max(self._rows, count)
        return [*range(count), *[0] * (self._rows - count)]

    def config(self, config: GenerationConfig, prompt_length: int) -> GenerationConfig:
        """The config with the length of the cache: the one that is set, if it is enough, or else the largest that was needed
        so far, in steps."""
        given, needed = getattr(config, "max_cache_len", None) or 0, prompt_length + config.max_new_tokens
        self._length = max(self._length, given if needed <= given else -(-needed // STEP) * STEP)
        found = copy.copy(config)
        found.max_cache_len = self._length
        return found

    def decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """`decode` with the cache that is kept, in place of the equal one that `generate` has made for it."""

        def with_cache(*args: Any, **kwargs: Any) -> Any:
            shape = self._rows, [getattr(layer, "max_cache_len", None) for layer in kwargs["past_key_values"].layers]
            if self._cache is None or self._cache[0] != shape:
                self.release()
                self._cache = shape, kwargs["past_key_values"]
                for layer in self._cache[1].layers:
                    if hasattr(layer, "max_cache_len"):
                        layer.update = partial(_update, layer)
            kwargs["past_key_values"] = self._cache[1]
            self._cache[1].reset()
            return decode(*args, **kwargs)

        return with_cache

    def keep_forwards(self) -> None:
        """Put the forward methods of the last time in place of those that were just replaced by equal ones."""
        for module in self._model.modules():
            forward = vars(module).get("forward")
            if not isinstance(forward, partial):
                continue
            kept = self._forwards.get(module)
            if kept is not None and _equal(kept, forward):
                vars(module)["forward"] = kept
            else:
                self._forwards[module] = forward
                for each in forward.args:
                    if isinstance(each, Tensor):
                        torch._dynamo.mark_static_address(each)

    def release(self) -> None:
        """Give up the cache."""
        if self._cache is not None:
            for layer in self._cache[1].layers:
                vars(layer).pop(
                    "update", None
                )  # it refers to the layer, whose memory is released with the last reference
        self._cache = None


def _update(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The layer's own `update`, which expects one dtype: under autocast, values are narrower than keys, to which transformers
    has applied the position in float32, and attention would make the keys as narrow."""
    dtype = layer.dtype if layer.is_initialized else values.dtype
    return cast(tuple[Tensor, Tensor], type(layer).update(layer, keys.to(dtype), values.to(dtype), *args, **kwargs))


def _equal(one: partial[Any], other: partial[Any]) -> bool:
    """Whether both call one function with the same objects."""
    same = len(one.args) == len(other.args) and all(a is b for a, b in zip(one.args, other.args, strict=True))
    return same and one.func is other.func and not one.keywords and not other.keywords
