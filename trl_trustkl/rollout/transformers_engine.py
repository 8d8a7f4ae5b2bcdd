"""Sampling responses, and the log-probability each token had when it was drawn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..errors import out_of_range
from ..policy import cpu, lora, split_lm


class Sampler(LogitsProcessor):
    """Draws each token, and keeps the log-probability it had.

    It must be the last processor, so that the scores it sees are those that are sampled from. It leaves the drawn token as
    the only one that greedy decoding can take. Inverting the distribution function takes one uniform number for each
    sequence, where `torch.multinomial` draws one for each entry of the vocabulary.
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(-1)
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        level = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulative[:, -1:]
        # The first entry whose cumulative probability exceeds the level: never one of probability 0. There is none where
        # the scores are not numbers; the last one then stands in, and the update is refused for its log-probability.
        token = torch.searchsorted(cumulative, level, right=True).clamp_(max=scores.shape[-1] - 1)
        self.columns.append(logps.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)


def sampling_with(sampler: Sampler):
    """A decoding method for `generate(custom_generate=…)`: the model's own, with the sampler put last."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        processors = LogitsProcessorList([*logits_processor, sampler])
        greedy = copy.copy(generation_config)
        greedy.do_sample = False
        return model._sample(input_ids, processors, stopping_criteria, greedy, **kwargs)

    return decode


def sample_responses(
    policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, *, stop_ids: list[int], config: GenerationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one response for each prompt: ids and mask [b, T] with T = `config.max_new_tokens`, and log-probs [b, T].

    The mask is True up to and including the first stop token. Everything after it, and every position that was never
    sampled, holds the padding token.
    """
    sampler = Sampler()
    causal = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    padding = config.pad_token_id
    if padding >= causal.get_input_embeddings().weight.shape[0]:  # the model must not see it, not even masked
        config = copy.copy(config)
        config.pad_token_id = 0
        prompt_ids = torch.where(prompt_mask, prompt_ids, 0)
    with torch.no_grad(), ready_to_generate(causal):
        sequences = causal.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            generation_config=config,
            custom_generate=sampling_with(sampler),
        )
    new = sequences[:, prompt_ids.shape[1] :]
    logp = torch.stack(sampler.columns, dim=1)[:, : new.shape[1]]
    missing = config.max_new_tokens - new.shape[1]
    response = nn.functional.pad(new, (0, missing), value=padding)
    sampled = torch.arange(config.max_new_tokens, device=new.device) < new.shape[1]
    mask = response_mask(response, stop_ids) & sampled
    response = torch.where(mask, response, padding)
    return response, mask, torch.where(mask, nn.functional.pad(logp, (0, missing)), 0.0)


def stop_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: Any, *, text: bool) -> list[int]:
    """The tokens that end a response.

    `stop_token_id` alone where it is set. With `stop_token="eos"`, the default for text and chat prompts, every end of
    sequence that the tokenizer or the model's generation config declares (a chat model's end of turn among them). None
    with "none", the default for a dataset of token ids, as in TRL.
    """
    if args.stop_token_id is not None:
        vocabulary = policy.get_input_embeddings().weight.shape[0]
        if not 0 <= args.stop_token_id < vocabulary:
            raise out_of_range("stop_token_id", args.stop_token_id, f"a token of the model's, 0 to {vocabulary - 1}")
        return [args.stop_token_id]
    if (args.stop_token or ("eos" if text else "none")) == "none":
        return []
    declared = policy.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})


def response_mask(response: Tensor, stop_ids: list[int]) -> Tensor:
    """True up to and including the first stop token, [b, t]; everywhere in a row that has none."""
    stops = torch.isin(response, torch.tensor(stop_ids, dtype=response.dtype, device=response.device))
    return stops.long().cumsum(-1) - stops.long() == 0


def ends_with_stop(response: Tensor, mask: Tensor, stop_ids: list[int]) -> Tensor:
    """Whether each response ended by itself, [b]."""
    stops = torch.isin(response, torch.tensor(stop_ids, dtype=response.dtype, device=response.device))
    return (stops & mask).any(-1)


def generation_config(
    *, response_length: int, temperature: float, stop_ids: list[int], pad_token_id: int, extra: dict[str, Any] | None
) -> GenerationConfig:
    """Plain sampling at a temperature from the whole vocabulary, unless `extra` (generation_kwargs) says otherwise."""
    return GenerationConfig(
        **{
            "max_new_tokens": response_length,
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": stop_ids or None,
            "pad_token_id": pad_token_id,
            "use_cache": True,
            **(extra or {}),
        }
    )


@contextmanager
def ready_to_generate(causal: nn.Module) -> Iterator[None]:
    """The model as generation needs it, put back afterwards.

    Its own generation config would fill every option left unset (an end of sequence where there is to be none, a
    repetition penalty), so a blank one stands in. Gradient checkpointing would switch the KV cache off. The model stays in
    train mode: dropout is off, and eval mode would repack 4-bit weights for inference (see quantization.unpack_4bit_weights).
    """
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    # generate() slices the prompt's last state; PyTorch multiplies a slice by a copy of the head for each sequence.
    hook = causal.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    checkpointed = split_lm.checkpointed(causal)
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        with cpu.dequantised_on_cpu(causal), lora.short_forward(lora.linear_layers(causal)):
            yield
    finally:
        hook.remove()
        causal.generation_config = own_config
        for module in checkpointed:
            module.gradient_checkpointing = True
