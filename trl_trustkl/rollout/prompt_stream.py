"""Training prompts from a stream: an IterableDataset, which has no length and is read in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datasets import IterableDataset

from ..errors import DataError

Prepare = Callable[[dict[str, Any], int], dict[str, Any]]
"""Makes a row with token ids from a row of the stream and its place, or raises DataError."""


class PromptStream:
    """The rows of a stream by their places, counted from 0.

    The stream is shuffled as in TRL's GRPO, through a buffer, and begins again with another order when it ends. The row at a
    place follows from the seed, so that a resumed run continues with the next row; it reads the rows before it again. To go
    back to an earlier place, too, the stream is read from its start.

    Raises DataError for a stream that is empty or cannot be read.
    """

    def __init__(self, dataset: IterableDataset, seed: int, prepare: Prepare) -> None:
        self._dataset = dataset.shuffle(seed=seed)
        self.prepare = prepare
        self._restart()

    def _restart(self) -> None:
        self._pass = 0
        self._place = 0
        self._last: dict[str, Any] = {}
        self._rows: Iterator[dict[str, Any]] = self._begin()

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place < self._place - 1:
            self._restart()
        while self._place <= place:
            self._last = self._next()
        return self.prepare(self._last, place)

    def _begin(self) -> Iterator[dict[str, Any]]:
        self._dataset.set_epoch(self._pass)
        return iter(self._dataset)

    def _next(self) -> dict[str, Any]:
        try:
            row = next(self._rows, None)
            if row is None:
                self._pass += 1
                self._rows = self._begin()
                row = next(self._rows, None)
        except Exception as error:  # of the network, of a file, or of the user's code that makes the rows
            raise DataError(
                f"`train_dataset`: row {self._place} of the stream could not be read ({type(error).__name__}: {error})."
            ) from error
        if row is None:
            raise DataError("`train_dataset` is empty; it must have at least one row with a prompt.")
        self._place += 1
        return row


class StreamOrder:
    """The places of a stream's rows for each update. The rows that an update does not take are left for the next one; without a
    length, the entire run counts as one pass."""

    def __init__(self, batch_size: int, updates: int) -> None:
        self.batch_size = batch_size
        self.batches_per_pass = updates

    def rows(self, update: int) -> list[int]:
        """The places of the rows of the batch of `update` (counted from 0), over all processes."""
        return list(range(update * self.batch_size, (update + 1) * self.batch_size))


def rows_of_stream(dataset: IterableDataset, name: str) -> list[dict[str, Any]]:
    """All rows of a stream, read into memory."""
    try:
        return list(dataset)
    except Exception as error:
        raise DataError(f"`{name}`: the stream could not be read ({type(error).__name__}: {error}).") from error
