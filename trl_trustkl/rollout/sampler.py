"""Sampling of a token by inverting the distribution function, with one uniform number for each token."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

BLOCK = 512
"""The number of tokens whose probabilities are summed before the search."""
_BELOW_ONE = 1 - 2.0**-53
"""The largest float64 below 1."""


def uniform_numbers(seeds: Sequence[int], length: int) -> Tensor:
    """The random numbers of responses, [len(seeds), length], in float64 on the CPU. A row depends on its seed alone."""
    rows = torch.empty(len(seeds), length, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return rows


def invert(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of each row whose cumulative probability exceeds a share `uniform` of the row's sum, and the sum, [B, 1].

    It is never a token of probability 0. A row of NaN gets some token. All sums are in float64: those of blocks first, then
    those within the block that was found, so that the probabilities are read once.
    """
    size = probs.shape[-1]
    whole = size // BLOCK * BLOCK
    sums = probs[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK)).sum(-1, dtype=torch.float64)
    if whole < size:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], dim=-1)
    cumulative = functional.pad(sums.cumsum(-1), (1, 0))
    total = cumulative[:, -1:]
    level = uniform.unsqueeze(-1) * total
    block = torch.searchsorted(cumulative, level, right=True).clamp_(max=sums.shape[-1]) - 1
    entries = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(-1, entries.clamp_(max=size - 1)).cumsum(-1, dtype=torch.float64)
    # The two ways of summing may differ in the last digit, so that the level may exceed what is inside.
    level = torch.minimum(level - cumulative.gather(-1, block), inside[:, -1:] * _BELOW_ONE)
    token = block * BLOCK + torch.searchsorted(inside, level, right=True)
    return token.clamp_(max=size - 1), total


class Sampler(LogitsProcessor):
    """Samples each token, and keeps its log-probability.

    It must be the last processor, so that its scores are those of the sampled distribution. It marks the sampled token in
    the scores, which are a copy that `generate` made, so that greedy decoding takes it. uniform: a random number in [0, 1)
    for each row and token, [B, T]; `torch.multinomial` would draw one for each entry of the vocabulary.
    """

    def __init__(self, uniform: Tensor) -> None:
        self.columns: list[Tensor] = []
        self._uniform = uniform
        self._probs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._probs is None:  # kept: on a CPU, new memory of this size for each token takes longer than the search
            self._probs = torch.empty_like(scores)
        probs = torch.softmax(scores, -1, out=self._probs)
        token, total = invert(probs, self._uniform[:, len(self.columns)])
        self.columns.append((probs.gather(-1, token) / total).log_().float().squeeze(-1))
        return scores.scatter_(-1, token, math.inf)

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """The decoding method for `generate(custom_generate=…)`: the model's, with this processor last."""
        processors = LogitsProcessorList([*logits_processor, self])
        greedy = copy.copy(generation_config)
        greedy.do_sample = False
        return model._sample(input_ids, processors, stopping_criteria, greedy, **kwargs)
