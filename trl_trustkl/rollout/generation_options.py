"""Validation of `generation_kwargs`, the generation options of transformers that a run may set."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig
from transformers.generation import logits_process

from ..errors import ConfigError, is_finite, out_of_range, shown, unknown_name

_SET_ELSEWHERE = {
    "max_new_tokens": "response_length",
    "max_length": "response_length",
    "temperature": "temperature",
    "eos_token_id": "stop_token_id",
    "pad_token_id": "the tokenizer's pad token",
    **dict.fromkeys(
        ("do_sample", "num_beams", "num_return_sequences", "return_dict_in_generate", "output_scores", "use_cache")
    ),
}
"""Options that the trainer sets, and the field or token that determines their value; None if the value is fixed."""

_PROCESSORS: dict[str, tuple[str, Any]] = {
    "top_p": ("TopPLogitsWarper", 1.0),
    "top_k": ("TopKLogitsWarper", 0),
    "min_p": ("MinPLogitsWarper", None),
    "typical_p": ("TypicalLogitsWarper", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", 0.0),
    "eta_cutoff": ("EtaLogitsWarper", 0.0),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", 1.0),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", 0),
}
"""For each option the logits processor that checks its range, and the value that disables it."""


def check_generation_kwargs(extra: dict[str, Any]) -> None:
    """Raise ConfigError for an option that is unknown, out of range, or set by a field of the configuration."""
    for key, instead in _SET_ELSEWHERE.items():
        if key in extra:
            fix = f"set {instead} instead." if instead else "the trainer depends on its value; leave it out."
            raise ConfigError(f"`generation_kwargs` got {key!r}: {fix}")
    known = GenerationConfig().to_dict()
    for key in extra:
        if key not in known:
            raise unknown_name("generation_kwargs", key, known)
    for key, value in extra.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_finite(value):
            raise out_of_range(f"generation_kwargs['{key}']", value, "a finite number")
    try:
        GenerationConfig(**{"do_sample": True, **extra}).validate()
        for key, (processor, off) in _PROCESSORS.items():  # `validate` does not check these ranges
            if extra.get(key, off) not in (None, off):
                getattr(logits_process, processor)(extra[key])
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"`generation_kwargs` got {shown(extra)}: {error}") from None
