"""The ends of responses, and sampled responses as the padded tensors of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, out_of_range
from ..types import Prompts, Rollout
from .engine import RolloutEngine


def stop_ids(
    policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: Any, *, text: bool
) -> list[int]:
    """The tokens that end a response.

    If `stop_token_id` is set, only that. With `stop_token="eos"`, the default for text and chat prompts, every end of
    sequence that the tokenizer or the model's generation config declares, such as a chat model's end of turn. None with
    `stop_token="none"`, the default for a dataset of token ids, as in TRL.
    """
    if args.stop_token_id is not None:
        vocabulary = policy.get_input_embeddings().weight.shape[0]
        if not 0 <= args.stop_token_id < vocabulary:
            raise out_of_range("stop_token_id", args.stop_token_id, f"a token of the model's, 0 to {vocabulary - 1}")
        return [args.stop_token_id]
    if (args.stop_token or ("eos" if text else "none")) == "none":
        return []
    eos = policy.generation_config.eos_token_id
    declared = eos if isinstance(eos, list) else [eos]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})


def is_stop(response: Tensor, stop_ids: list[int]) -> Tensor:
    """Where a response has a stop token, [b, t]."""
    return torch.isin(response, torch.tensor(stop_ids, dtype=response.dtype, device=response.device))


def response_mask(ends: Tensor) -> Tensor:
    """True up to and including the first end, [b, t]; True everywhere in a row without one. `ends` is True where a row ends
    with a stop token or a stop string."""
    ends = ends.long()
    return ends.cumsum(-1) - ends == 0


def ended(rollout: Rollout, stop_ids: list[int]) -> Tensor:
    """Whether each response ended with a stop token or a stop string, [B]; where the rollout does not say, whether it has a
    stop token."""
    if rollout.ended is not None:
        return rollout.ended
    return (is_stop(rollout.response_ids, stop_ids) & rollout.response_mask).any(-1)


def sample(engine: RolloutEngine, prompts: Prompts, *, seed: int, length: int, pad_token_id: int) -> Rollout:
    """Sample a response to each prompt, of at most `length` tokens; responses are padded on the right to `length`.

    Raises ModelError for an engine that returns anything else.
    """
    ids = [row[mask] for row, mask in zip(prompts.ids, prompts.mask, strict=True)]
    samples = engine.generate(ids, seed)
    lengths = torch.tensor([len(each) for each in samples.ids], device=prompts.ids.device)
    longest = max(map(len, samples.ids), default=0)
    if not len(samples.ids) == len(samples.finish_reasons) == len(ids) or longest > length:
        raise ModelError(
            f"the rollout engine {type(engine).__name__} returned {len(samples.ids)} responses of up to {longest} tokens and "
            f"{len(samples.finish_reasons)} finish reasons; it must return {len(ids)}, one for each prompt, of at most "
            f"response_length={length} tokens."
        )

    def padded(rows: list[Tensor], fill: float) -> Tensor:
        return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=fill) for row in rows])

    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=padded(samples.ids, pad_token_id),
        response_mask=torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1),
        sampler_logp=None if samples.logps is None else padded(samples.logps, 0.0),
        rows=prompts.rows,
        context=prompts.context,
        ended=torch.tensor([reason == "stop" for reason in samples.finish_reasons], device=lengths.device),
    )
