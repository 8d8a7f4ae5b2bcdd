"""Tiny models and tokenizers, made on the spot: no test needs a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
