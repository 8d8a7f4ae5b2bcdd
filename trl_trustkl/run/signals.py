"""SIGTERM and Ctrl-C: the first asks the run to end well, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Overdue(Exception):
    """The update in hand has had its grace period; it is given up. Never leaves `train`."""


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is remembered and the second raises KeyboardInterrupt.

    Only in the main thread, where alone Python handles signals; elsewhere nothing is ever received. A signal that the
    process was started to ignore (as `nohup` does) stays ignored.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._event = threading.Event()
        self._previous: dict[int, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self.received: int | None = None
        self._deadline = float("inf")
        self._event.clear()

    def __enter__(self) -> StopRequest:
        self._forget()  # what an earlier run received
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = int(number)
        self._deadline = time.monotonic() + self.grace_seconds
        self._event.set()
        # print() may be what was interrupted, and must not be entered twice.
        os.write(2, b"\nFinishing the update in hand, then saving; a second signal (or Ctrl-C) stops at once.\n")

    @property
    def overdue(self) -> bool:
        """Whether the update in hand has had its grace period."""
        return time.monotonic() > self._deadline

    def wait(self, seconds: float) -> bool:
        """Sleep, unless a signal comes or came; whether one did."""
        return self._event.wait(seconds)
