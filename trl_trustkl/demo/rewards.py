"""The demo's reward: how positive a completion is according to VADER's word list."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..errors import require_packages

Messages = Sequence[dict[str, Any]]


def sentiment(prompts: Sequence[Any], completions: Sequence[str | Messages], **columns: Any) -> list[float | None]:
    """VADER's compound score of each completion, from -1 (negative) to 1 (positive); 0 for an empty one.

    The demo uses a word list because it is easily exploited: without an anchor, the policy learns within a few updates that
    a list of positive words scores higher than a sentence.
    """
    return [float(_analyzer().polarity_scores(_text(completion))["compound"]) for completion in completions]


def _text(completion: str | Messages) -> str:
    """A completion as text; of chat messages, their contents."""
    if isinstance(completion, str):
        return completion
    return " ".join(str(message["content"]) for message in completion)


@cache
def _analyzer() -> Any:
    # Imported at the first call, since only the demo needs the package.
    require_packages("The reward `sentiment`", "vaderSentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
