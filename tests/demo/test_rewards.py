"""The demo's reward, and the error without its package."""

from __future__ import annotations

import sys

import pytest

from trl_trustkl.demo import rewards
from trl_trustkl.errors import MissingPackageError


def test_sentiment_reads_text_and_messages_alike() -> None:
    pytest.importorskip("vaderSentiment")
    texts = ["What a lovely, happy day!", "A terrible, sad mess.", "", "A table."]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    scores = rewards.sentiment(["x"] * 4, texts, topic=["a"] * 4)
    assert scores == rewards.sentiment([[{"role": "user", "content": "x"}]] * 4, messages)
    assert scores[0] > 0.5 and scores[1] < -0.5 and scores[2:] == [0.0, 0.0]


def test_sentiment_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    rewards._analyzer.cache_clear()
    with pytest.raises(MissingPackageError, match="pip install vaderSentiment"):
        rewards.sentiment(["x"], ["y"])
