"""Items that all processes compute together, however many of them each requests. Two threads stand for two processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes import single_process
from trl_trustkl.parallel.lockstep import in_lockstep

ITEMS = 5


class Both:
    """The agreement of two threads, which have to ask the same number of times."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._flags: list[bool] = []

    def any(self, flag: bool) -> bool:
        self._flags.append(flag)
        self._barrier.wait()
        found = any(self._flags)
        if self._barrier.wait() == 0:
            self._flags.clear()
        self._barrier.wait()
        return found


class Items:
    """Items that are counted as they are computed. closed: whether their iteration has ended."""

    def __init__(self) -> None:
        self.computed, self.closed = 0, False

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(ITEMS):
                self.computed += 1
                yield number
        finally:
            self.closed = True


def in_two_threads(*readers: Callable[[Iterator[int]], Any]) -> tuple[list[Items], list[Any]]:
    """What the readers computed, and returned or raised."""
    both, items, results = Both(), [Items(), Items()], [None, None]

    def run(index: int) -> None:
        try:
            with in_lockstep(items[index](), both) as mine:  # type: ignore[arg-type]
                results[index] = readers[index](mine)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return items, results


def some(count: int) -> Callable[[Iterator[int]], list[int]]:
    return lambda items: [next(items) for _ in range(count)]


def fails(items: Iterator[int]) -> None:
    next(items)
    raise OSError("no disk")


@pytest.mark.parametrize(
    ("readers", "computed"),
    [
        ((list, list), ITEMS),
        ((list, lambda items: None), ITEMS),
        ((lambda items: None, list), ITEMS),
        ((some(2), some(4)), 4),
        ((some(2), lambda items: None), 2),
        ((fails, lambda items: None), 1),
        ((fails, list), ITEMS),
        ((lambda items: None, lambda items: None), 0),
    ],
)
def test_both_compute_what_either_requests(readers, computed):
    items, results = in_two_threads(*readers)
    assert [each.computed for each in items] == [computed, computed]
    assert all(each.closed for each in items) == (computed > 0)
    for reader, result in zip(readers, results, strict=True):
        assert (type(result) is OSError) == (reader is fails)
        if reader is list:
            assert result == list(range(ITEMS))


def test_one_process_reads_as_without():
    with in_lockstep(iter([1, 2, 3]), single_process()) as items:
        assert list(items) == [1, 2, 3]
