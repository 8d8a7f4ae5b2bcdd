"""Checks of what an error says."""

from __future__ import annotations

from typing import Any


def assert_says(error: Any, *pieces: Any) -> None:
    """Check that the message of an error that `pytest.raises` caught contains each of the pieces."""
    message = str(error.value)
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is missing in: {message}"
