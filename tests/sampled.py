"""Samples of an engine of transformers, and their comparison with those of another."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.transformers_engine import TransformersEngine

PROMPTS = [torch.arange(3, 3 + length) + 2 * i for i, length in enumerate([1, 5, 3, 2, 4, 1, 6, 2])]


def engine(model: Any, options: dict[str, Any] | None = None, **changes: Any) -> TransformersEngine:
    settings = {"response_length": 8, "temperature": 0.7, "stop_ids": [2, 5, 11, 17, 23], "pad_token_id": 0}
    settings |= {"batch_size": 3, "autocast": contextlib.nullcontext} | changes
    return TransformersEngine(model, generation_kwargs=options, **settings)


def assert_same(found: Samples, wanted: Samples, atol: float = 2e-5) -> None:
    """The same tokens; the log-probabilities differ by rounding."""
    assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in wanted.ids]
    assert found.finish_reasons == wanted.finish_reasons
    for logps, old in zip(found.logps, wanted.logps, strict=True):
        torch.testing.assert_close(logps, old, rtol=0, atol=atol)
