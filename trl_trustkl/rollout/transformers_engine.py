"""The rollout engine that samples with transformers' `generate`, and keeps the log-probability of each sampled token."""

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
    """Samples each token, and keeps its log-probability.

    It must be the last processor, so that its scores are those of the sampled distribution. The scores that it returns
    leave only the sampled token to greedy decoding. Inverting the distribution function takes one uniform number for each
    sequence, whereas `torch.multinomial` draws one for each entry of the vocabulary.
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(-1)
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        level = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulative[:, -1:]
        # The first entry whose cumulative probability exceeds the level, never one of probability 0. If the scores are NaN,
        # there is none; the last entry is used, and the update is rejected because of its log-probability.
        token = torch.searchsorted(cumulative, level, right=True).clamp_(max=scores.shape[-1] - 1)
        self.columns.append(logps.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)

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


class TransformersEngine:
    """Samples from the policy itself, for `batch_size` prompts at a time, so that there is nothing to sync.

    pad_token_id: the tokenizer's, which may be outside of the model's vocabulary. autocast: the context of the policy's
    forward passes. generation_kwargs: further arguments of `generate`; without any, tokens are sampled from the entire
    vocabulary.
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
        self._batch_size = batch_size
        self._autocast = autocast
        # The model has no embedding for a padding token outside of its vocabulary, masked or not.
        known = self._causal.get_input_embeddings().weight.shape[0]
        self._pad_token_id = pad_token_id if pad_token_id < known else 0
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
        """Nothing to check."""

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to release."""

    def generate(self, prompt_ids: Sequence[Tensor], seed: int) -> Samples:
        """Sample with one random stream for all prompts, so that the result depends on which prompts share a batch."""
        with self._autocast(), rng.seeded(prompt_ids[0].device, seed):
            starts = range(0, len(prompt_ids), self._batch_size)
            rows = [row for i in starts for row in self._generate(prompt_ids[i : i + self._batch_size])]
        return Samples([ids for ids, _, _ in rows], [logps for _, logps, _ in rows], [reason for _, _, reason in rows])

    @torch.no_grad()
    def _generate(self, prompt_ids: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, FinishReason]]:
        """Token ids, log-probabilities and finish reason of each response."""
        ids = pad_sequence(list(prompt_ids), batch_first=True, padding_value=self._pad_token_id, padding_side="left")
        ones = [torch.ones_like(each) for each in prompt_ids]
        sampler = Sampler()
        with ready_to_generate(self._causal):
            sequences = self._causal.generate(
                input_ids=ids,
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
                generation_config=self._config,
                custom_generate=sampler.decode,
            )
        new = sequences[:, ids.shape[1] :]
        mask = response_mask(new, self._stop_ids)
        logps = torch.stack(sampler.columns, dim=1)[:, : new.shape[1]]
        lengths, stopped = mask.sum(-1).tolist(), ends_with_stop(new, mask, self._stop_ids).tolist()
        return [
            (row[:length], logp[:length], "stop" if stop else "length")
            for row, logp, length, stop in zip(new, logps, lengths, stopped, strict=True)
        ]


@contextmanager
def ready_to_generate(causal: PreTrainedModel) -> Iterator[None]:
    """Prepare the model for generation, and restore it afterwards.

    A blank generation config replaces the model's, which would set every option that is not given, such as an end of
    sequence or a repetition penalty. Gradient checkpointing is disabled, since it disables the KV cache. The model stays in
    train mode: dropout is off, and eval mode would pack 4-bit weights for inference (`quantization.unpack_4bit_weights`).
    """
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    # `generate` passes a slice of the states to the head, and PyTorch would copy the head's weight for each sequence.
    head = causal.get_output_embeddings()
    assert head is not None  # `SplitLM` rejects a model without one
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
