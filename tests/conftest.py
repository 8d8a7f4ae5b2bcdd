"""Tiny models and tokenizers, made on the spot: no test needs a network, and none depends on the caller's settings."""

from __future__ import annotations

from tests import isolation

# isort: split

import signal

import pytest
import torch

from tests import tiny

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    with isolation.terminal():
        yield


def pytest_terminal_summary(terminalreporter):
    """Say how many bad inputs were generated, in this process and in the workers."""
    properties = [pair for report in terminalreporter.getreports("passed") for pair in report.user_properties]
    if refused := sum(count for name, count in properties if name == "refused"):
        terminalreporter.write_line(f"fuzz: {refused:,} bad inputs, all refused")
