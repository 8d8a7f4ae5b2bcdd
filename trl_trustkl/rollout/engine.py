"""The interface of rollout engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length"]


class Samples(NamedTuple):
    """One response for each prompt, in the order of the prompts, without padding.

    ids: token ids [t], including the stop token. logps: log-probability of each token under the distribution that it was
    sampled from, [t]; None if the engine does not return it. finish_reasons: "stop" after a stop token or a stop string, else
    "length".
    """

    ids: list[Tensor]
    logps: list[Tensor] | None
    finish_reasons: list[FinishReason]


class RolloutEngine(Protocol):
    """Samples responses from the policy, with sampling settings that are fixed when it is built.

    The trainer calls `check` at the beginning of a run, `sync` before every rollout, and `close` at the end of the run,
    also if it fails. Each run calls `check` first. An evaluation outside a run calls only `sync` and `generate`, after `close`
    too. An engine raises RolloutError where it fails; any other exception becomes one.
    """

    def check(self) -> None:
        """Raise ConfigError or ModelError if the engine does not support the policy, and RolloutError if it does not work."""

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load the policy's weights, unless the engine already has this `version`.

        The weights have the names of a checkpoint of the base model. An adapter is merged into them, and quantised weights are
        dequantised, layer by layer as the iterator is read; the policy stays as it is. Every update makes a new version, also
        one that was rolled back or scaled back. With FSDP2 and ZeRO-3 the iterator gathers each layer, in which processes whose
        engine reads nothing take part.
        """

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        """Sample one response for each prompt (token ids [p]), with all randomness of a response from its seed."""
        ...

    def close(self) -> Any:
        """Release processes and memory."""
