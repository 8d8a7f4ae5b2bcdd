"""The sampling settings of a run, as vLLM's, and validation of `generation_kwargs` for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, is_finite, out_of_range, shown, unknown_name

SET_ELSEWHERE = {
    "max_tokens": "response_length",
    "temperature": "temperature",
    "stop_token_ids": "stop_token_id",
    "ignore_eos": "stop_token",
    "n": "num_generations",
    **dict.fromkeys(("seed", "logprobs", "prompt_logprobs", "detokenize", "output_kind", "skip_special_tokens")),
}
"""Options that the trainer sets, and the field that determines their value; None if the value is fixed."""

_TOKENS = "a list of at least one token id"
_STRINGS = "a list of strings of at least one character"


class _Option(NamedTuple):
    """valid: the values, in words. off: those that turn the option off. cuts: whether it removes tokens that the policy may
    sample, so that no weight corrects for it."""

    valid: str
    off: tuple[Any, ...]
    cuts: bool


OPTIONS = {
    "top_k": _Option("an integer >= -1; 0 or -1 turns it off", (0, -1), True),
    "top_p": _Option("in (0, 1]; 1 turns it off", (1,), True),
    "min_p": _Option("in [0, 1]; 0 turns it off", (0,), True),
    "min_tokens": _Option("an integer >= 0; 0 turns it off", (0,), True),
    "bad_words": _Option(_STRINGS, ([],), True),
    "allowed_token_ids": _Option(_TOKENS, (), True),
    "repetition_penalty": _Option("in (0, 2]; 1 turns it off", (1,), False),
    "presence_penalty": _Option("in [-2, 2]; 0 turns it off", (0,), False),
    "frequency_penalty": _Option("in [-2, 2]; 0 turns it off", (0,), False),
    "stop": _Option(f"a string, or {_STRINGS}", ([],), False),
}
"""Options of vLLM's SamplingParams that may be set."""


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(each and isinstance(each, str) for each in value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _holds(name: str, value: Any) -> bool:
    if name in ("bad_words", "stop"):
        return _strings([value] if name == "stop" and isinstance(value, str) else value)
    if name == "allowed_token_ids":
        return (
            isinstance(value, (list, tuple)) and len(value) > 0 and all(_integer(each) and each >= 0 for each in value)
        )
    if name in ("top_k", "min_tokens"):
        return _integer(value) and value >= (-1 if name == "top_k" else 0)
    if not is_finite(value):
        return False
    ranges = {"top_p": 0 < value <= 1, "min_p": 0 <= value <= 1, "repetition_penalty": 0 < value <= 2}
    return ranges.get(name, -2 <= value <= 2)


def check_vllm_options(given: dict[str, Any], *, corrected: bool) -> None:
    """Raise one ConfigError for all options that vLLM does not know, that are set elsewhere, or, where the loss is `corrected`
    for the sampler, that remove tokens: a token that is never sampled has no weight."""
    if wrong := [error for name, value in given.items() if (error := _error(name, value, corrected)) is not None]:
        raise ConfigError(" ".join(map(str, wrong)))


def _error(name: str, value: Any, corrected: bool) -> ConfigError | None:
    """What is wrong with an option; None for one that can be set."""
    if name in SET_ELSEWHERE:
        field = SET_ELSEWHERE[name]
        fix = f"set `{field}` instead" if field else "the trainer sets it"
        return ConfigError(f"`generation_kwargs` got {name!r}: {shown(value)}; {fix}.")
    if name not in OPTIONS:
        return unknown_name("generation_kwargs", name, OPTIONS)
    option = OPTIONS[name]
    if value is None:
        return None
    if not _holds(name, value):
        return out_of_range(f"generation_kwargs[{name!r}]", value, option.valid)
    if option.cuts and corrected and value not in option.off:
        return ConfigError(
            f"`generation_kwargs` got {name!r}: {shown(value)} with vllm_importance_sampling_correction=True: it removes "
            "tokens that the policy may sample, which no weight makes up for. Leave it out, or set "
            "vllm_importance_sampling_correction=False."
        )
    return None


class VLLMSampling(NamedTuple):
    """The sampling settings of a run. length: of a response, at most, in tokens. stop_ids: the tokens that end one. options:
    further parameters of vLLM, see `OPTIONS`."""

    length: int
    temperature: float
    stop_ids: Sequence[int]
    options: dict[str, Any]

    def parameters(self, seed: int) -> dict[str, Any]:
        """The parameters of one response, by the names that vLLM's SamplingParams and its server share.

        All filters are given: a server would otherwise take those of the model's generation config.
        """
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        own = {name: value for name, value in self.options.items() if value is not None}
        return {
            "max_tokens": self.length, "temperature": self.temperature, "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True, "logprobs": 0, "seed": seed, **neutral, **own,
        }  # fmt: skip
