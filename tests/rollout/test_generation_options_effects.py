"""The effect of each generation option on sampling, against its logits processor applied to one row at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache
from transformers.generation import logits_process

from tests import tiny
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.generation_options import WORKING, check_generation_kwargs
from trl_trustkl.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, TEMPERATURE = 8, 0.7
STOPS = [2, 5, 11]
PROMPTS = [torch.arange(3, 7) + 5 * i for i in range(6)]
END = len(PROMPTS[0])


def sampled(model: Any, **options: Any) -> Samples:
    check_generation_kwargs(options)
    engine = TransformersEngine(
        model, response_length=LENGTH, temperature=TEMPERATURE, stop_ids=STOPS, pad_token_id=0, batch_size=4,
        autocast=contextlib.nullcontext, generation_kwargs=options,
    )  # fmt: skip
    return engine.generate(PROMPTS, tiny.seeds(PROMPTS, 1))


def logits_after(model: Any, context: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=context.unsqueeze(0)).logits[:, -1].float()


def processor(name: str, *arguments: Any, **options: Any) -> Callable[[Any, Tensor], Any]:
    """What builds the processor for a model and a prompt."""
    return lambda model, prompt: getattr(logits_process, name)(*arguments, **options)


WATERMARK = {"greenlist_ratio": 0.3, "bias": 4.0, "hashing_key": 7, "seeding_scheme": "lefthash", "context_width": 1}
AFTER_TEMPERATURE: dict[str, tuple[Any, Callable[[Any, Tensor], Any]]] = {
    "top_k": (2, processor("TopKLogitsWarper", 2)),
    "top_p": (0.5, processor("TopPLogitsWarper", 0.5)),
    "top_h": (0.4, processor("TopHLogitsWarper", 0.4)),
    "min_p": (0.5, processor("MinPLogitsWarper", 0.5)),
    "typical_p": (0.5, processor("TypicalLogitsWarper", 0.5)),
    "epsilon_cutoff": (0.05, processor("EpsilonLogitsWarper", 0.05)),
    "eta_cutoff": (0.3, processor("EtaLogitsWarper", 0.3)),
    "watermarking_config": (WATERMARK, processor("WatermarkLogitsProcessor", tiny.VOCAB, "cpu", **WATERMARK)),
}
BEFORE_TEMPERATURE: dict[str, tuple[Any, Callable[[Any, Tensor], Any]]] = {
    "repetition_penalty": (1.5, processor("RepetitionPenaltyLogitsProcessor", 1.5)),
    "no_repeat_ngram_size": (1, processor("NoRepeatNGramLogitsProcessor", 1)),
    "encoder_repetition_penalty": (
        3.0,
        lambda model, prompt: logits_process.EncoderRepetitionPenaltyLogitsProcessor(3.0, prompt.unsqueeze(0)),
    ),
    "encoder_no_repeat_ngram_size": (
        1,
        lambda model, prompt: logits_process.EncoderNoRepeatNGramLogitsProcessor(1, prompt.unsqueeze(0)),
    ),
    "bad_words_ids": ([[7], [8, 9]], processor("NoBadWordsLogitsProcessor", [[7], [8, 9]])),
    "sequence_bias": ([[[7], 4.0]], processor("SequenceBiasLogitsProcessor", [[[7], 4.0]])),
    "suppress_tokens": ([*range(20)], processor("SuppressTokensLogitsProcessor", [*range(20)])),
    "begin_suppress_tokens": ([*range(20)], processor("SuppressTokensAtBeginLogitsProcessor", [*range(20)], END)),
    "min_new_tokens": (LENGTH, processor("MinNewTokensLengthLogitsProcessor", END, LENGTH, STOPS)),
    "exponential_decay_length_penalty": ([1, 3.0], processor("ExponentialDecayLengthPenalty", [1, 3.0], STOPS, END)),
    "forced_eos_token_id": (2, processor("ForcedEOSTokenLogitsProcessor", END + LENGTH, 2)),
    "guidance_scale": (
        3.0,
        lambda model, prompt: logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model),
    ),
}
ELSEWHERE = {
    "stop_strings": "tests/rollout/test_transformers_engine_stop_strings.py",
    "cache_config": "the quantized cache needs optimum-quanto",
    "disable_compile": "nothing is compiled on a CPU",
    "compile_config": "tests/rollout/test_static_decoding.py",
}


@pytest.mark.parametrize("option", [*AFTER_TEMPERATURE, *BEFORE_TEMPERATURE])
def test_an_option_has_the_effect_of_its_logits_processor(option):
    model = tiny.llama().eval()
    value, build = (AFTER_TEMPERATURE | BEFORE_TEMPERATURE)[option]
    found, plain = sampled(model, **{option: value}), sampled(model)
    assert [ids.tolist() for ids in found.ids] != [ids.tolist() for ids in plain.ids]
    for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
        process, wanted = build(model, prompt), []
        for position, token in enumerate(ids):
            context = torch.cat([prompt, ids[:position]])
            scores, row = logits_after(model, context), context.unsqueeze(0)
            before = option in BEFORE_TEMPERATURE
            scores = process(row, scores) / TEMPERATURE if before else process(row, scores / TEMPERATURE)
            wanted.append(scores.log_softmax(-1)[0, token])
        torch.testing.assert_close(logps, torch.stack(wanted), rtol=0, atol=1e-4)


def caches_and_widths(model: Any) -> list[tuple[Any, int]]:
    """The cache and the number of tokens of each forward pass, noted as they come."""
    seen: list[tuple[Any, int]] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.append((options["past_key_values"], options["input_ids"].shape[1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def same(one: Samples, other: Samples) -> bool:
    return [ids.tolist() for ids in one.ids] == [ids.tolist() for ids in other.ids]


def test_prompts_are_read_in_chunks():
    model = tiny.llama().eval()
    plain = sampled(model)
    seen = caches_and_widths(model)
    assert same(sampled(model, prefill_chunk_size=3), plain)
    assert [width for _, width in seen[:3]] == [3, 1, 1], "a prompt of 4 tokens, and the first of the response"


def test_the_cache_is_the_one_that_is_set():
    model = tiny.llama().eval()
    seen = caches_and_widths(model)
    plain = sampled(model)
    assert not any(isinstance(cache, StaticCache) for cache, _ in seen)
    seen.clear()
    assert same(sampled(model, cache_implementation="static"), plain)
    assert all(isinstance(cache, StaticCache) for cache, _ in seen)


@pytest.mark.skipif("max_cache_len" not in GenerationConfig().to_dict(), reason="the option is newer")
def test_a_static_cache_has_the_length_that_is_set():
    model = tiny.llama().eval()
    seen = caches_and_widths(model)
    sampled(model, cache_implementation="static", max_cache_len=99)
    assert {cache.layers[0].max_cache_len for cache, _ in seen} == {99}


def test_every_option_that_works_is_tested():
    here = {"prefill_chunk_size", "cache_implementation", "max_cache_len"}
    assert {*AFTER_TEMPERATURE, *BEFORE_TEMPERATURE, *here, *ELSEWHERE} == set(WORKING)


@pytest.mark.parametrize("option", ["top_k", "top_p"])
def test_an_option_that_is_none_is_off(option):
    """`generate` has a default for it, which is top_k=50; the tiny vocabulary has fewer entries."""
    model = tiny.llama(vocab_size=400).eval()
    assert same(sampled(model, **{option: None}), sampled(model))
