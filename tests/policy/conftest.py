"""Fixtures of the tests of models."""

from __future__ import annotations

import pytest

from tests import tiny
from trl_trustkl.policy import exact_kl


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that a tiny model needs several, of several blocks each; the last ones are not full."""
    monkeypatch.setattr(exact_kl, "CHUNK_ELEMENTS", tiny.VOCAB * 5)
    monkeypatch.setattr(exact_kl, "CACHE_ELEMENTS", tiny.VOCAB * 2)
