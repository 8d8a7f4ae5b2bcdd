"""The rollout engine that samples with transformers' `generate`, and keeps the log-probability of each sampled token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import ConfigError
from ..policy import cpu, lora, split_lm
from ..policy.loading import without_adapter
from ..trl_compat.decoding import without_waiting
from .captured_pass import can_capture, captured
from .engine import FinishReason, Samples
from .generation_options import STATIC, check_stop_ids, check_token_ids, compile_config, may_capture, stop_strings
from .sampler import Sampler, uniform_numbers
from .sampling import is_stop, response_mask
from .static_decoding import StaticDecoding


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
    vocabulary. tokenizer: what `stop_strings` needs among them. run: calls a function that makes passes of the policy; see
    `Replicated.gathered` and `Replicated.run`. complete: whether this process has all weights for its duration. Without, each
    pass gathers them layer by layer, and all processes sample until the last response of any of them has ended. capture:
    whether to record the pass over one token in a CUDA graph, on a GPU and for a model where that is possible. The weights must
    then stay where they are in memory during a rollout.
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
        run: Callable[[Callable[[], Samples]], Samples] = lambda call: call(),
        complete: bool = True,
        capture: bool = True,
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
        self._causal = without_adapter(policy)
        self._stop_ids = stop_ids
        self._length = response_length
        self._batch_size = batch_size
        self._autocast = autocast
        self._run = run
        self._complete = complete
        # The model has no embedding for a padding token outside of its vocabulary, masked or not.
        known = self._causal.get_input_embeddings().weight.shape[0]
        self._pad_token_id = pad_token_id if pad_token_id < known else 0
        check_token_ids(extra, known)
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
        if (compiled := compile_config(extra)) is not None:
            extra["compile_config"] = compiled
            check_compilable(self._causal)
        self._may_capture = capture and complete and may_capture(extra)
        self._config = GenerationConfig(**settings | extra)
        self._adapter_weights: list[Tensor] = []
        captured_options = {"cache_implementation": STATIC[0], "disable_compile": True}
        self._captured_config = GenerationConfig(**settings | extra | captured_options)
        self._static = StaticDecoding(self._causal) if extra.get("cache_implementation") in STATIC else None

    def check(self) -> None:
        """Nothing to check."""

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Release the static cache."""
        if self._static is not None:
            self._static.release()

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        """Sample for prompts of similar length at a time, longest first, which takes the least padding."""
        with torch.no_grad():
            return self._run(lambda: self._samples(prompt_ids, seeds))

    def _samples(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]), reverse=True)
        uniform = uniform_numbers(seeds, self._length)[order].to(prompt_ids[0].device)
        rows: dict[int, tuple[Tensor, Tensor, FinishReason]] = {}
        captures = self._may_capture and can_capture(self._causal)
        config = self._captured_config if captures else self._config
        context = captured(self._causal) if captures else nullcontext((self._static, None))
        with self._autocast(), context as (static, recorded):
            for start in range(0, len(order), self._batch_size):
                chunk = slice(start, start + self._batch_size)
                found = self._generate([prompt_ids[i] for i in order[chunk]], uniform[chunk], config, static)
                rows.update(zip(order[chunk], found, strict=True))
        if recorded is not None and recorded.waits:
            self._may_capture = False  # without a graph, a cache of fixed length would only take longer
        ids, logps, reasons = zip(*(rows[i] for i in range(len(order))), strict=True)
        return Samples(list(ids), list(logps), list(reasons))

    def _generate(
        self,
        prompt_ids: Sequence[Tensor],
        uniform: Tensor,
        config: GenerationConfig,
        static: StaticDecoding | None,
    ) -> list[tuple[Tensor, Tensor, FinishReason]]:
        """Token ids, log-probabilities and finish reason of each response."""
        count, padded = len(prompt_ids), len({len(each) for each in prompt_ids}) > 1
        sampler = Sampler(uniform)
        if static is not None:
            rows = static.rows(count)
            prompt_ids, sampler = [prompt_ids[i] for i in rows], Sampler(uniform[rows])
            config, padded = static.config(config, max(map(len, prompt_ids))), True
        ids = pad_sequence(list(prompt_ids), batch_first=True, padding_value=self._pad_token_id, padding_side="left")
        ones = [torch.ones_like(each) for each in prompt_ids]
        strings: list[StopStrings] = []
        if self._tokenizer is not None and self._strings:
            strings.append(StopStrings(self._strings, self._tokenizer, ids.shape[1]))
        with (
            ready_to_generate(self._causal, self._adapter_weights, static, complete=self._complete),
            without_waiting(ids.device, padded=padded),
        ):
            sequences = self._causal.generate(
                input_ids=ids,
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
                generation_config=config,
                custom_generate=sampler.decode if static is None else static.decoding(sampler.decode),
                stopping_criteria=StoppingCriteriaList(strings),
                synced_gpus=not self._complete,
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
            for row, logp, length, stop in list(zip(new, logps, lengths, stopped, strict=True))[:count]
        ]


@contextmanager
def ready_to_generate(
    causal: PreTrainedModel,
    adapter_weights: list[Tensor],
    static: StaticDecoding | None = None,
    *,
    complete: bool = True,
) -> Iterator[None]:
    """Prepare the model for generation, and restore it afterwards. `adapter_weights`: the buffers of `lora.short_forward`.
    complete: whether this process has all weights, so that they can be prepared for all tokens at once.

    A blank generation config replaces the model's, which would set every option that is not given, such as an end of
    sequence or a repetition penalty. Gradient checkpointing is disabled, since it disables the KV cache. The model stays in
    train mode: dropout is off, and eval mode would pack 4-bit weights for inference (`quantization.unpack_4bit_weights`).
    """
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    # `generate` passes a slice of the states to the head, and PyTorch would copy the head's weight for each sequence.
    head = causal.get_output_embeddings()
    assert head is not None  # `SplitLM` rejects a model without one
    hook = head.register_forward_pre_hook(_contiguous)
    checkpointed = split_lm.checkpointed(causal)
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        with ExitStack() as stack:
            if complete:
                stack.enter_context(cpu.dequantised_on_cpu(causal))
                stack.enter_context(lora.short_forward(lora.linear_layers(causal), adapter_weights))
            if static is not None:
                static.keep_forwards()
            yield
    finally:
        hook.remove()
        causal.generation_config = own_config
        for module in checkpointed:
            module.gradient_checkpointing = True


def _contiguous(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),)


def check_compilable(causal: PreTrainedModel) -> None:
    """Raise ConfigError for weights of which transformers compiles no pass."""
    quantizer = getattr(causal, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise ConfigError(
            "`generation_kwargs['compile_config']` got a value with a model that is quantised by "
            f"{type(quantizer).__name__}, of which transformers compiles no pass; leave it out, or load the model without "
            "its quantization_config."
        )
