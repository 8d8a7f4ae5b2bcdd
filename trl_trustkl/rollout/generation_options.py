"""Validation of `generation_kwargs`, the generation options of transformers that a run may set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import CompileConfig, GenerationConfig
from transformers.generation import logits_process

from ..errors import ConfigError, did_you_mean, is_finite, out_of_range, shown, unknown_name

SET_ELSEWHERE = {
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

WORKING = (
    *("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "guidance_scale"),
    *("watermarking_config", "min_new_tokens", "exponential_decay_length_penalty", "forced_eos_token_id"),
    *("stop_strings", "prefill_chunk_size", "cache_implementation", "cache_config", "max_cache_len", "disable_compile"),
    "compile_config",
)
"""Options that have an effect. The two that are named after an encoder compare with the prompt."""

_BEAMS = "only beam search uses it"
_ASSISTED = "only assisted decoding uses it, and the trainer samples from the policy alone"
_OUTPUT = "it adds an output that the trainer does not read"
_ENCODER_DECODER = "it is for encoder-decoder models"
_METADATA = "it describes a saved generation config"

REFUSED = {
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "low_memory"), _BEAMS),
    **dict.fromkeys(("constraints", "force_words_ids"), _BEAMS),
    "penalty_alpha": "only contrastive search uses it",
    "dola_layers": "only DoLa decoding uses it",
    **dict.fromkeys(
        (
            *("prompt_lookup_num_tokens", "max_matching_ngram_size", "is_assistant", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"),
            *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
        ),
        _ASSISTED,
    ),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits"), _OUTPUT),
    **dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id"), _ENCODER_DECODER),
    "bos_token_id": "every prompt has its tokens already",
    "token_healing": "it would change the last token of a prompt, which the trainer has tokenized already",
    "min_length": "it counts the prompt and its padding; set min_new_tokens instead",
    "max_time": "it would cut responses by the clock, so that a seed does not reproduce a run; set response_length instead",
    "renormalize_logits": "the trainer samples from normalised probabilities in any case",
    "remove_invalid_values": "an update with logits that are not finite is rejected in any case",
    "continuous_batching_config": "only continuous batching uses it",
    **dict.fromkeys(("_from_model_config", "_commit_hash", "transformers_version"), _METADATA),
}
"""Options that have no effect in sampling with one beam, or one that the trainer cannot allow, and why."""

STATIC = ("static", "offloaded_static")
_CACHES = ("dynamic", "offloaded", "quantized", *STATIC)
"""Caches that `generate` selects by its configuration. It ignores the others, such as "paged", or has deprecated them."""

_PROCESSORS: dict[str, tuple[str, Any]] = {
    "top_p": ("TopPLogitsWarper", 1.0),
    "top_k": ("TopKLogitsWarper", 0),
    "top_h": ("TopHLogitsWarper", None),
    "min_p": ("MinPLogitsWarper", None),
    "typical_p": ("TypicalLogitsWarper", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", 0.0),
    "eta_cutoff": ("EtaLogitsWarper", 0.0),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", 1.0),
    "encoder_repetition_penalty": ("RepetitionPenaltyLogitsProcessor", 1.0),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", 0),
    "encoder_no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", 0),
    "bad_words_ids": ("NoBadWordsLogitsProcessor", None),
    "sequence_bias": ("SequenceBiasLogitsProcessor", None),
}
"""For each option the logits processor that checks its range, and the value that disables it."""


_FLAG = "True or False"
_COMPILING: list[tuple[str, Any, str]] = [
    ("fullgraph", bool, _FLAG),
    ("dynamic", (bool, type(None)), f"{_FLAG}, or None"),
    ("backend", str, "the name of a backend of torch.compile"),
    ("mode", (str, type(None)), "the name of a mode of torch.compile, or None"),
    ("options", (dict, type(None)), "a dict of the backend's options, or None"),
]
"""The types of CompileConfig's fields."""


def check_generation_kwargs(extra: dict[str, Any]) -> None:
    """Raise ConfigError for an option that is unknown, out of range, without effect, or set by a field of the configuration."""
    _check_names(extra)
    for key, value in extra.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_finite(value):
            raise out_of_range(f"generation_kwargs['{key}']", value, "a finite number")
    least = extra.get("min_new_tokens")
    if least is not None and (not isinstance(least, int) or least < 0):
        raise out_of_range("generation_kwargs['min_new_tokens']", least, "an integer >= 0")
    stop_strings(extra)
    compiled = {"compile_config": compile_config(extra)}
    try:
        GenerationConfig(**{"do_sample": True, **extra, **compiled}).validate()
        for key, (processor, off) in _PROCESSORS.items():  # `validate` does not check these ranges
            if extra.get(key, off) not in (None, off):
                getattr(logits_process, processor)(extra[key])
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ConfigError(f"`generation_kwargs` got {shown(extra)}: {error}") from None


def _check_names(extra: dict[str, Any]) -> None:
    """Raise one ConfigError that names all options that a run cannot set. Those that would be ignored are accepted with their
    default value."""
    known = GenerationConfig().to_dict()
    usable = sorted(key for key in WORKING if key in known)
    defaults = known | getattr(GenerationConfig, "_get_default_generation_params", dict)()
    given = {
        key: value
        for key, value in extra.items()
        if key not in SET_ELSEWHERE and value is not None and value is not False and value != defaults.get(key)
    }
    keys: dict[str, list[str]] = {}
    for key, reason in (*_set_elsewhere(extra), *_ignored(given, known), *_unknown(extra, known, usable)):
        keys.setdefault(reason, []).append(f"{key!r}: {shown(extra[key])}")
    if keys:
        groups = "; ".join(f"{', '.join(some)} ({reason})" for reason, some in keys.items())
        raise ConfigError(
            f"`generation_kwargs` got options that cannot be set: {groups}. Leave them out; the options that may be set are "
            f"{', '.join(map(repr, usable))}."
        )


def _set_elsewhere(extra: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that the trainer sets, each with what determines its value."""
    for key in extra:
        if key in SET_ELSEWHERE:
            instead = SET_ELSEWHERE[key]
            yield key, f"set {instead} instead" if instead else "the trainer depends on its value"


def _unknown(extra: dict[str, Any], known: dict[str, Any], usable: list[str]) -> Iterator[tuple[str, str]]:
    """The options that do not exist, each with the nearest that does."""
    for key in extra:
        if key not in known and key not in REFUSED and key not in SET_ELSEWHERE:
            yield key, f"generate() has no such option.{did_you_mean(key, usable)}"


def _ignored(given: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that would be ignored, each with the reason."""
    cache = given.get("cache_implementation")
    static = f"only cache_implementation={STATIC[0]!r} or {STATIC[1]!r} uses it"
    needs = {
        "cache_implementation": (cache in _CACHES, f"generate() selects only {', '.join(map(repr, _CACHES))}"),
        "cache_config": (cache == "quantized", "only cache_implementation='quantized' uses it"),
        "max_cache_len": (cache in STATIC, static),
        "disable_compile": (cache in STATIC, static),
        "compile_config": (
            cache == STATIC[0] and not given.get("disable_compile"),
            f"only cache_implementation={STATIC[0]!r} without disable_compile uses it",
        ),
        "min_new_tokens": (
            not (given.get("min_new_tokens") and given.get("stop_strings")),
            "it does not hold back stop_strings",
        ),
    }
    unexamined = f"it is new in transformers {transformers.__version__}, and not known to have an effect"
    for key in given:
        if key in REFUSED:
            yield key, REFUSED[key]
        elif key in known and key not in WORKING:
            yield key, unexamined
        elif key in needs and not needs[key][0]:
            yield key, needs[key][1]


def compile_config(extra: dict[str, Any]) -> CompileConfig | None:
    """How the decoding pass is compiled, on any device; None where the option is not set. Raises ConfigError for what
    torch.compile does not know."""
    given = extra.get("compile_config")
    if given is None:
        return None
    name, known = "generation_kwargs['compile_config']", [each.name for each in dataclasses.fields(CompileConfig)]
    if not isinstance(given, dict):
        raise out_of_range(name, given, f"a dict of {', '.join(map(repr, known))}")
    for key in given:
        if key not in known:
            raise unknown_name(name, key, known)
    for key, types, valid in _COMPILING:
        if not isinstance(given.get(key), types) and key in given:
            raise out_of_range(f"{name}[{key!r}]", given[key], valid)
    backend, mode, options = given.get("backend", "inductor"), given.get("mode"), given.get("options")
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise unknown_name(f"{name}['backend']", backend, torch.compiler.list_backends())
    if mode is not None and mode not in (modes := import_module("torch._inductor").list_mode_options()):
        raise unknown_name(f"{name}['mode']", mode, modes)
    if mode is not None and options is not None:
        raise ConfigError(
            f"`{name}` got both `mode` and `options`; torch.compile accepts only one. Leave one of them out."
        )
    # CompileConfig's mode would be in the way of options, and other backends than inductor have none.
    mode_of_inductor = {} if options is None and backend == "inductor" else {"mode": None}
    # By default, torch.compile makes one slower pass for caches of all lengths, instead of a pass for each length.
    fields: dict[str, Any] = {"dynamic": False} | mode_of_inductor | given
    found = CompileConfig(**fields)
    vars(found)["_compile_all_devices"] = True  # transformers compiles on accelerators only, unless it is told to
    return found


def may_capture(extra: dict[str, Any]) -> bool:
    """Whether the options leave it to the engine how the pass over one token is launched."""
    cache = extra.get("cache_implementation", STATIC[0])
    others = ("compile_config", "disable_compile", "prefill_chunk_size")
    return cache == STATIC[0] and not any(extra.get(key) for key in others)


def stop_strings(extra: dict[str, Any]) -> list[str]:
    """The strings that end a response; none where the option is not set. Raises ConfigError for anything else."""
    given = extra.get("stop_strings")
    if given is None:
        return []
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, (list, tuple)) or not strings or not all(s and isinstance(s, str) for s in strings):
        raise out_of_range(
            "generation_kwargs['stop_strings']", given, "a string, or a list of strings, of at least one character each"
        )
    return list(strings)


def check_stop_ids(extra: dict[str, Any], stop_ids: list[int]) -> None:
    """Raise ConfigError for an option that has no effect with these stop tokens."""
    if not stop_ids:
        for key in ("min_new_tokens", "exponential_decay_length_penalty"):
            if extra.get(key):
                raise ConfigError(
                    f"`generation_kwargs` got {key!r}: {shown(extra[key])}, which has no effect without a stop token; set "
                    "stop_token='eos' or stop_token_id, or leave it out."
                )
    if stops := [word for word in extra.get("bad_words_ids") or () if len(word) == 1 and word[0] in stop_ids]:
        raise ConfigError(
            f"`generation_kwargs` got 'bad_words_ids' with {shown(stops)}, which generate() ignores because they are stop "
            "tokens; use suppress_tokens for them."
        )


def check_token_ids(extra: dict[str, Any], vocabulary: int) -> None:
    """Raise ConfigError for an option that names a token outside the vocabulary, for which `generate` fails or does nothing."""
    for name in ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"):
        given = extra.get(name) or ()
        if name == "sequence_bias" and not isinstance(given, dict):
            given = [sequence for sequence, _ in given]
        for token in _flat(given):
            if not 0 <= token < vocabulary:
                raise out_of_range(
                    f"generation_kwargs[{name!r}]",
                    token,
                    f"a token id from 0 to {vocabulary - 1}, the model's vocabulary",
                )


def _flat(ids: Any) -> Iterator[int]:
    """The token ids of an option: a list of them, or of sequences of them."""
    for each in ids:
        if isinstance(each, int):
            yield each
        else:
            yield from _flat(each)
