"""Where the record of an update goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SaveError
from ..parallel.processes import Processes
from ..records import BoundRecord


class Recorder:
    """Hands the record of an update and its completions to every callback that has a method `on_record`.

    `BoundReportCallback`, which writes them to the disk, is one of those. Only the main process's callbacks get them.
    """

    def __init__(self, callbacks: Callable[[], Sequence[Any]], processes: Processes) -> None:
        self._callbacks = callbacks
        self._processes = processes

    def write(
        self, record: BoundRecord, completions: list[dict[str, Any]], *, args: Any, state: Any, control: Any
    ) -> None:
        """SaveError on all processes where the record cannot be written. Called by all of them."""
        failure: SaveError | None = None
        if self._processes.is_main:
            try:
                for callback in self._callbacks():
                    if hasattr(callback, "on_record"):
                        callback.on_record(args, state, control, record=record, completions=completions)
            except SaveError as error:
                failure = error
        self._processes.raise_on_all(failure)
