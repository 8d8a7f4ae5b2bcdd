"""Fixtures of several tests in this folder."""

from __future__ import annotations

from functools import partial

import pytest


@pytest.fixture
def config(tmp_path):
    """A configuration for the tests by enumeration."""
    from tests.enumeration import configuration

    return partial(configuration, tmp_path)
