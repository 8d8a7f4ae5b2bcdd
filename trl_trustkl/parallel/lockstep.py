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
    If computing an item fails on a process, its error is raised on all of them.
    """
    failed: list[Exception] = []
    over = False

    def agreed(request: bool) -> bool:
        """Whether any process requests an item."""
        nonlocal over
        requested, failure = processes.any_of([request, bool(failed)])
        if failure:
            over = True  # on all processes, which leave without another agreement
            processes.raise_on_all(failed[0] if failed else None)
        return requested

    def requested() -> Iterator[Item]:
        while agreed(True):
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                failed.append(error)
                raise
            yield item

    try:
        yield requested()
    finally:
        try:
            while not over and agreed(False):
                try:
                    next(items, None)
                except Exception as error:
                    failed.append(error)
        finally:
            if isinstance(items, Generator):
                items.close()
