"""A terminal as standard output."""

from __future__ import annotations


class Terminal:
    """An output that is a terminal and keeps its text."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True
