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
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import ConfigError
from ..policy import cpu, lora, split_lm
from ..run import rng
from .engine import FinishReason, Samples
from .generation_options import check_stop_ids, stop_strings
from .sampling import is_stop, response_mask


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


class StopStrings(StoppingCriteria):
    """Ends a response with the token that completes one of the strings in its text, and keeps where that happened.

    The text is what the tokenizer decodes the response to, with special tokens. The prompt, the first `prompt_length` tokens
    of a row, is not part of it. transformers' own criterion reads the prompt too, and `generate` does not pass a tokenizer
    on to it where the decoding method is a function.
    """

    def __init__(self, strings: list[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.columns: list[Tensor] = []
        self._strings = strings
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        # Each token adds at least one byte. The token before the string is decoded too, since decoders strip the space
        # of the first one.
        self._window = 1 + max(len(string.encode()) for string in strings)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, self._prompt_length :][:, -self._window :]
        texts = self._tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        found = [any(string in text for string in self._strings) for text in texts]
        self.columns.append(torch.tensor(found, device=input_ids.device))
        return self.columns[-1]


class TransformersEngine:
    """Samples from the policy itself, for `batch_size` prompts at a time, so that there is nothing to sync.

    pad_token_id: the tokenizer's, which may be outside of the model's vocabulary. autocast: the context of the policy's
    forward passes. generation_kwargs: further arguments of `generate`; without any, tokens are sampled from the entire
    vocabulary. tokenizer: what `stop_strings` needs among them.
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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        # An option that is None would get the default of `generate`, such as top_k=50.
        extra = {key: value for key, value in (generation_kwargs or {}).items() if value is not None}
        check_stop_ids(extra, stop_ids)
        self._strings = stop_strings(extra)
        extra.pop("stop_strings", None)  # `generate` would need a tokenizer for them
        if self._strings and tokenizer is None:
            raise ConfigError(
                "`tokenizer` got None; it must be the policy's tokenizer with generation_kwargs['stop_strings']."
            )
        self._tokenizer = tokenizer
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
        self._config = GenerationConfig(**settings | extra)

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
        strings: list[StopStrings] = []
        if self._tokenizer is not None and self._strings:
            strings.append(StopStrings(self._strings, self._tokenizer, ids.shape[1]))
        with ready_to_generate(self._causal):
            sequences = self._causal.generate(
                input_ids=ids,
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
                generation_config=self._config,
                custom_generate=sampler.decode,
                stopping_criteria=StoppingCriteriaList(strings),
            )
        new = sequences[:, ids.shape[1] :]
        ends = is_stop(new, self._stop_ids)
        for criterion in strings:  # what follows the end of a row is padding, or sampled where there is no stop token
            ends |= torch.stack(criterion.columns, dim=1)[:, : new.shape[1]]
        mask = response_mask(ends)
        logps = torch.stack(sampler.columns, dim=1)[:, : new.shape[1]]
        lengths, stopped = mask.sum(-1).tolist(), (ends & mask).any(-1).tolist()
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
