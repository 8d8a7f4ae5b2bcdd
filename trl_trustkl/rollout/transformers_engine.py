"""The engine that samples with transformers' `generate`, and keeps the log-probability each token had when it was drawn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..policy import cpu, lora, split_lm
from ..run import rng
from .engine import FinishReason, Samples
from .sampling import ends_with_stop, response_mask


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


def sampling_with(sampler: Sampler) -> Callable[..., Any]:
    """A decoding method for `generate(custom_generate=…)`: the model's own, with the sampler put last."""

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        processors = LogitsProcessorList([*logits_processor, sampler])
        greedy = copy.copy(generation_config)
        greedy.do_sample = False
        return model._sample(input_ids, processors, stopping_criteria, greedy, **kwargs)

    return decode


class TransformersEngine:
    """Samples from the policy itself, so that there is nothing to sync.

    Args:
        policy: the model that is trained; PEFT models too.
        response_length: the largest number of new tokens.
        temperature: of the sampling.
        stop_ids: the tokens that end a response.
        pad_token_id: the tokenizer's; the model need not know it.
        batch_size: prompts sampled from at a time.
        autocast: the context that the policy's forward passes run in.
        generation_kwargs: further arguments of `generate`; without any, sampling is from the whole vocabulary.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        *,
        response_length: int,
        temperature: float,
        stop_ids: list[int],
        pad_token_id: int,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._causal = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        self._stop_ids = stop_ids
        # The model must not see a padding token that it does not know, not even masked.
        known = self._causal.get_input_embeddings().weight.shape[0]
        self._pad_token_id = pad_token_id if pad_token_id < known else 0
        self._batch_size = batch_size
        self._autocast = autocast
        settings = {
            "max_new_tokens": response_length,
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": stop_ids or None,
            "pad_token_id": self._pad_token_id,
            "use_cache": True,
        }
        self._config = GenerationConfig(**settings | (generation_kwargs or {}))

    def check(self) -> None:
        """There is nothing to check."""

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """There is nothing to take over."""

    def generate(self, prompt_ids: Sequence[Tensor], seed: int) -> Samples:
        """One stream of random numbers serves all prompts: which of them stand in a batch changes what is drawn."""
        ids: list[Tensor] = []
        logps: list[Tensor] = []
        reasons: list[FinishReason] = []
        with self._autocast(), rng.seeded(prompt_ids[0].device, seed):
            for start in range(0, len(prompt_ids), self._batch_size):
                part = self._generate(prompt_ids[start : start + self._batch_size])
                ids += part[0]
                logps += part[1]
                reasons += part[2]
        return Samples(ids, logps, reasons)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _generate(self, prompt_ids: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[FinishReason]]:
        ids = pad_sequence(list(prompt_ids), batch_first=True, padding_value=self._pad_token_id, padding_side="left")
        ones = [torch.ones_like(each) for each in prompt_ids]
        sampler = Sampler()
        with torch.no_grad(), ready_to_generate(self._causal):
            sequences = self._causal.generate(
                input_ids=ids,
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
                generation_config=self._config,
                custom_generate=sampling_with(sampler),
            )
        new = sequences[:, ids.shape[1] :]
        mask = response_mask(new, self._stop_ids)
        logp = torch.stack(sampler.columns, dim=1)[:, : new.shape[1]]
        ended = ends_with_stop(new, mask, self._stop_ids).tolist()
        lengths = mask.sum(-1).tolist()
        return (
            [row[:length] for row, length in zip(new, lengths, strict=True)],
            [row[:length] for row, length in zip(logp, lengths, strict=True)],
            ["stop" if stopped else "length" for stopped in ended],
        )


@contextmanager
def ready_to_generate(causal: PreTrainedModel) -> Iterator[None]:
    """The model as generation needs it, put back afterwards.

    Its own generation config would fill every option left unset (an end of sequence where there is to be none, a
    repetition penalty), so a blank one stands in. Gradient checkpointing would switch the KV cache off. The model stays in
    train mode: dropout is off, and eval mode would repack 4-bit weights for inference (see quantization.unpack_4bit_weights).
    """
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    # generate() slices the prompt's last state; PyTorch multiplies a slice by a copy of the head for each sequence.
    head = causal.get_output_embeddings()
    assert head is not None  # `SplitLM` refuses a model without one
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
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
