"""Items that all processes compute together, however many of them each requests. Two threads stand for two processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.processes import single_process
from trl_trustkl.parallel.lockstep import in_lockstep

ITEMS = 5


class Both:
    """The agreement of two threads, which have to ask the same number of times."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._values: list[Any] = []

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        return [any(each) for each in zip(*self._gathered(flags), strict=True)]

    def raise_on_all(self, error: Exception | None) -> None:
        for found in self._gathered(error):
            if found is not None:
                raise found

    def _gathered(self, value: Any) -> list[Any]:
        self._values.append(value)
        self._barrier.wait()
        found = list(self._values)
        if self._barrier.wait() == 0:
            self._values.clear()
        self._barrier.wait()
        return found


class Items:
    """Items that are counted as they are computed. closed: whether their iteration has ended. fails: the one that cannot be
    computed."""

    def __init__(self, fails: int | None = None) -> None:
        self.computed, self.closed, self.fails = 0, False, fails

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(ITEMS):
                self.computed += 1
                if number == self.fails:
                    raise MemoryError(f"item {number}")
                yield number
        finally:
            self.closed = True


def in_two_threads(
    *readers: Callable[[Iterator[int]], Any], items: Sequence[Items] | None = None
) -> tuple[Sequence[Items], list[Any]]:
    """What the readers computed, and returned or raised."""
    both, results = Both(), [None, None]
    items = [Items(), Items()] if items is None else items

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


@pytest.mark.parametrize("readers", [(list, list), (list, lambda items: None), (lambda items: None, list)])
def test_an_item_that_one_cannot_compute_is_an_error_of_both(readers):
    items, results = in_two_threads(*readers, items=[Items(), Items(fails=2)])
    assert [type(result) for result in results] == [MemoryError, MemoryError]
    assert [each.computed for each in items] == [3, 3] and all(each.closed for each in items)


def test_one_process_reads_as_without():
    with in_lockstep(iter([1, 2, 3]), single_process()) as items:
        assert list(items) == [1, 2, 3]
