"""SIGTERM and Ctrl-C: the first signal requests that the run saves and ends, the second ends it immediately."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Overdue(Exception):
    """The grace period of a signal is over, and the current update is abandoned. Caught within `train`."""


class StopRequest:
    """A context in which the first SIGTERM or SIGINT is stored and the second raises KeyboardInterrupt.

    Python handles signals only in the main thread; in other threads nothing is received. A signal that the process was
    started to ignore (as with `nohup`) stays ignored.
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
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._forget()  # outside of a run, nothing is overdue

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = int(number)
        self._deadline = time.monotonic() + self.grace_seconds
        self._event.set()
        # Not print(), which is not reentrant and may be what the signal interrupted.
        with suppress(OSError):
            os.write(
                2, b"\nFinishing the current update, then saving; a second signal (or Ctrl-C) stops immediately.\n"
            )

    def drop_closed_outputs(self) -> None:
        """After a signal, discard what is printed to a pipe without a reader: Ctrl-C ends `tee` too."""
        for descriptor in (1, 2) if self.received is not None else ():
            poll = select.poll()
            poll.register(descriptor, 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), descriptor)

    @property
    def overdue(self) -> bool:
        """Whether the grace period is over."""
        return time.monotonic() > self._deadline

    def wait(self, seconds: float) -> bool:
        """Sleep, but only until a signal is received; returns whether one was received, now or before."""
        return self._event.wait(seconds)
