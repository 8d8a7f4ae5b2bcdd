"""Reference computations: complete forward passes over the full vocabulary, in float64 after the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_trustkl.types import MicroBatch, Rollout


def dense_logps(model: Any, micro: MicroBatch, temperature: float) -> Tensor:
    """log π over the vocabulary at each response position, [b, t, V], from the model's complete forward pass, in float64."""
    with torch.no_grad():
        logits = model(
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, position_ids=micro.position_ids
        ).logits
    first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
    return (logits[:, first:-1].double() / temperature).log_softmax(-1)


def dense_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) over the last dimension, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def row_logps(model: Any, prompt: Tensor, response: Tensor, temperature: float) -> Tensor:
    """log π over the vocabulary at each token of one response, [t, V], from a forward pass without padding."""
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def rollout_logps(policy: nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    """log π over the vocabulary at every response token of a rollout, [N, V], from one forward pass over all of it.

    Rows are padded on the right. A causal model does not attend to what follows a token, so that neither an attention mask
    nor position ids are needed.
    """
    prompts, responses = unpadded(rollout)
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        logits = policy(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    pieces = [
        row[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        for row, prompt, response in zip(logits, prompts, responses, strict=True)
    ]
    return (torch.cat(pieces).double() / temperature).log_softmax(-1)


def unpadded(rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
    """The prompts and the responses of a rollout without padding."""
    prompts = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = [ids[mask] for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return prompts, responses
