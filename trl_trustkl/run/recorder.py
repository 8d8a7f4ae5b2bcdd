"""Passing the record of an update to the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SaveError
from ..parallel.processes import Processes
from ..records import BoundRecord
from .failure_handling import raised_on_all


class Recorder:
    """Passes the record of an update and its completions to every callback that has a method `on_record`, on the main
    process. `BoundReportCallback`, which writes them to the disk, is such a callback."""

    def __init__(self, callbacks: Callable[[], Sequence[Any]], processes: Processes) -> None:
        self._callbacks = callbacks
        self._processes = processes

    def write(
        self, record: BoundRecord, completions: list[dict[str, Any]], *, args: Any, state: Any, control: Any
    ) -> None:
        """Called by all processes; raises SaveError on all of them if the record cannot be written."""
        with raised_on_all(self._processes, SaveError):
            callbacks = self._callbacks() if self._processes.is_main else ()
            for callback in callbacks:
                if hasattr(callback, "on_record"):
                    callback.on_record(args, state, control, record=record, completions=completions)
