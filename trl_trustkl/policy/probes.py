"""Probes: forward passes over a few tokens that show what a model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """`model` in train mode, since the kernels of a forward pass depend on it (`quantization.unpack_4bit_weights`)."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def token_ids(model: PreTrainedModel | PeftModel, count: int) -> Tensor:
    """`count` different tokens of the model, [1, count], on its device."""
    device = next(model.parameters()).device
    return torch.arange(1, count + 1, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """The logits of a few tokens, [1, 8, V]."""
    with as_in_training(model):
        return model(input_ids=token_ids(model, 8), use_cache=False).logits


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors of one shape differ by at most `tolerance` times the largest finite magnitude that is expected.

    Entries that are not finite, such as the logit −inf of a token that a model excludes, must be equal.
    """
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], expected[~finite]):
        return False
    if not finite.any():
        return True
    differences = (found[finite] - expected[finite]).abs()
    return bool(differences.max() <= tolerance * expected[finite].abs().max())
