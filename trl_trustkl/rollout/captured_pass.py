"""The pass over one token of each row as a CUDA graph: recorded once in a rollout, and launched as a whole for each token.

A small model's pass has thousands of short kernels, and the host takes several times as long to launch them one by one as the
GPU takes to run them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.utils import logging

from .static_decoding import StaticDecoding

logger = logging.get_logger(__name__)

DEVICES = ("cuda",)
"""Devices whose kernels can be recorded."""
ATTENTION = ("sdpa", "eager")
"""Implementations of attention that read no length from the device."""

Replay = Callable[[], Any]
"""Runs a recorded pass, and returns its outputs, which are the same tensors each time."""


def can_capture(model: PreTrainedModel) -> bool:
    """Whether the pass over one token does the same for every token: transformers compiles it as one graph, all weights are on
    one device, positions are an input, and each layer keeps all of its tokens, in a cache of fixed length."""
    config = model.config.get_text_config(decoder=True)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or not is_recorded(devices.pop()):
        return False
    if not getattr(model, "_can_compile_fullgraph", False) or config._attn_implementation not in ATTENTION:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=config, max_cache_len=1).layers)


def is_recorded(device: torch.device) -> bool:
    """Whether a graph records what runs on the device: on the current one."""
    return device.type in DEVICES and (device.type != "cuda" or device.index == torch.cuda.current_device())


@contextmanager
def captured(model: PreTrainedModel) -> Iterator[tuple[StaticDecoding, CapturedPass]]:
    """Inside the context, the model's passes over one token are recorded and replayed. Use the given static decoding there.

    The weights must not move to other memory. Graph and cache are released at the end of the context.
    """
    own = vars(model).get("forward")
    static, recorded = StaticDecoding(model), CapturedPass(model.forward)
    vars(model)["forward"] = recorded
    try:
        yield static, recorded
    finally:
        static.release()
        for kept in ("_previous_max_cache_length", "_cache"):  # transformers' own: the next cache may be shorter
            vars(model).pop(kept, None)
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


class CapturedPass:
    """`forward`, whose passes over one token with a static cache are recorded at the second call and replayed from then on.

    The first one runs as usual. It initialises the libraries, and shows whether the host waits for the device: such a pass
    cannot be recorded. waits: whether one was found.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # `generate` reads the signature
        self._forward = forward
        self.waits = False
        self._passes: dict[Hashable, Callable[[dict[str, Any]], Any] | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if args else _key(kwargs)
        if key is None:
            return self._forward(*args, **kwargs)
        if key not in self._passes:
            return self._first(key, kwargs)
        run = self._passes[key]
        if run is None:
            run = self._passes[key] = self._recorded(kwargs)
        return run(kwargs)

    def _first(self, key: Hashable, kwargs: dict[str, Any]) -> Any:
        with synchronisations() as found:
            outputs = self._forward(**kwargs)
        self._passes[key] = None
        if found:
            self._passes[key] = lambda given: self._forward(**given)
            self.waits = True
            logger.warning_once(
                f"Sampling does not use a CUDA graph, because the model's pass waits for the GPU ({found[0]})."
            )
        return outputs

    def _recorded(self, kwargs: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        own = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, kwargs, is_leaf=_is_cache)
        replay = cuda_graph(lambda: self._forward(**own))

        def run(given: dict[str, Any]) -> Any:
            for tensor, value in zip(_tensors(own), _tensors(given), strict=True):
                tensor.copy_(value)
            return replay()

        return run


def _key(kwargs: dict[str, Any]) -> Hashable | None:
    """What a recorded pass depends on besides the values of its tensors; None for a pass that is not recorded."""
    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.shape[1] != 1 or not isinstance(cache, StaticCache):
        return None
    if not cache.layers[0].is_initialized:  # a prompt of one token
        return None
    values, structure = tree_flatten(kwargs, _is_cache)  # the mask may be a dict with one for each kind of layer
    parts: list[Hashable] = [repr(structure)]
    for value in values:
        if isinstance(value, Tensor):
            parts.append((value.shape, value.dtype))
        elif value is cache:
            parts.append(id(value))
        elif value is None or isinstance(value, (bool, int, float, str)):
            parts.append(value)
        else:
            return None
    return tuple(parts)


def _tensors(kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in tree_leaves(kwargs, _is_cache) if isinstance(value, Tensor)]


def _is_cache(value: Any) -> bool:
    return isinstance(value, StaticCache)


def cuda_graph(call: Callable[[], Any]) -> Replay:
    """Record the kernels of `call` on the current stream. Raises RuntimeError where one of them cannot be recorded."""
    graph, stream, caches = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.is_autocast_cache_enabled()
    # What the cache holds is released at the end of autocast, and the graph would read it.
    torch.set_autocast_cache_enabled(False)
    try:
        # Other threads, such as NCCL's watchdog, may go on with what a recording stream must not do.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "The model's pass over one token could not be recorded in a CUDA graph; set "
            "generation_kwargs={'cache_implementation': 'dynamic'} to sample without one."
        ) from error
    finally:
        torch.cuda.set_stream(stream)
        torch.set_autocast_cache_enabled(caches)

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """The lines, as file:number, in which the host waits for a CUDA device inside the context; complete at its end."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            waits = (each for each in caught if "synchronizing CUDA operation" in str(each.message))
            found += [f"{each.filename}:{each.lineno}" for each in waits]
