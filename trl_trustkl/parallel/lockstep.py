"""Iterators whose items all processes compute together."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .processes import Processes

Item = TypeVar("Item")


@contextmanager
def in_lockstep(items: Iterator[Item], processes: Processes) -> Iterator[Iterator[Item]]:
    """The items, of which all processes compute the next one as soon as any of them requests it.

    Computing an item may communicate, such as gathering the weights of a layer. A process may request fewer items than another,
    or none; it computes what the others request when it leaves the context, which all leave together. `items` is closed then.
    """

    def requested() -> Iterator[Item]:
        while processes.any(True):
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    try:
        yield requested()
    finally:
        while processes.any(False):
            next(items, None)
        if isinstance(items, Generator):
            items.close()
