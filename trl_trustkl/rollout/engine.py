"""What every rollout engine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length"]


class Samples(NamedTuple):
    """One response for each prompt, in the order of the prompts, without padding.

    ids: token ids [t], the stop token included. logps: log-probability of each token under the distribution that it was
    drawn from, [t]; None where the engine does not tell. finish_reasons: "stop" after a stop token, else "length".
    """

    ids: list[Tensor]
    logps: list[Tensor] | None
    finish_reasons: list[FinishReason]


class RolloutEngine(Protocol):
    """Samples responses from the policy. Its sampling settings are fixed when it is built.

    The trainer calls `check` when a run begins, `sync` before every rollout, and `close` when the run ends, also where it
    fails. A further run begins with `check` again. An evaluation outside of a run calls `sync` and `generate` alone.
    """

    def check(self) -> None:
        """Raise ConfigError or ModelError for an engine that cannot serve the policy."""

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights. A `version` that the engine has already needs nothing."""

    def generate(self, prompt_ids: Sequence[Tensor], seed: int) -> Samples:
        """Sample one response for each prompt (token ids [p]). All randomness comes from `seed`."""
        ...

    def close(self) -> Any:
        """Let go of processes and memory."""
