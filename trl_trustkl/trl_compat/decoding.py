"""transformers' decoding without waiting for the GPU at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)
"""Devices that compute while the host goes on."""


@contextmanager
def without_waiting(device: torch.device, *, padded: bool) -> Iterator[None]:
    """Inside the context, decoding reads no value from the device for a token.

    Whether all rows have ended is read one token late, by transformers' `DeferredStopCheck`, which transformers itself uses on
    MPS only. Whether attention to a single token needs a mask follows from `padded`, whether the batch has padding; with a
    static cache, it always does. A version of transformers without these functions is left as it is.
    """
    utils, masking = import_module("transformers.generation.utils"), import_module("transformers.masking_utils")
    with ExitStack() as stack:
        if device.type in DEVICES:
            if (check := getattr(utils, "DeferredStopCheck", None)) is not None:
                _replace(stack, check, "is_supported", staticmethod(_is_supported))
            if (read := getattr(masking, "_ignore_causal_mask_sdpa", None)) is not None:
                _replace(stack, masking, "_ignore_causal_mask_sdpa", _from_padding(read, padded))
        yield


def _replace(stack: ExitStack, owner: Any, name: str, new: Any) -> None:
    stack.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, new)


def _is_supported(device: Any, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
    """Whatever the device: a cache that is not returned keeps the entry of the extra token."""
    return not cache_is_returned and not is_assistant


def _from_padding(read: Callable[..., bool], padded: bool) -> Callable[..., bool]:
    """`read`, which tells whether a mask can be left out, without reading the mask in a pass over a single token."""

    def ignore(padding_mask: Tensor | None, q_length: int, *args: Any, **kwargs: Any) -> bool:
        if padding_mask is None or q_length > 1:
            return read(padding_mask, q_length, *args, **kwargs)
        return not padded and read(None, q_length, *args, **kwargs)

    return ignore
