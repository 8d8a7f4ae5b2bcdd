"""The record of an update is passed to callbacks."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from tests.processes import single_process
from trl_trustkl.errors import SaveError
from trl_trustkl.run.recorder import Recorder

RECORD: Any = object()
COMPLETIONS = [{"update": 1, "completion": "a"}]
WHERE = {"args": object(), "state": object(), "control": object()}


class Keeps(TrainerCallback):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def on_record(self, *args: Any, record: Any, completions: Any, **kwargs: Any) -> None:
        self.got.append((*args, record, completions, kwargs))


class FullDisk(Keeps):
    def on_record(self, *args: Any, **kwargs: Any) -> None:
        raise SaveError("the disk is full")


def recorder(callbacks: list[Any], *, main: bool = True) -> Recorder:
    processes = single_process()
    processes.is_main = main
    return Recorder(lambda: callbacks, processes)


def test_every_callback_with_the_method_gets_the_record():
    one, other = Keeps(), Keeps()
    recorder([one, TrainerCallback(), object(), other]).write(RECORD, COMPLETIONS, **WHERE)
    wanted = (*WHERE.values(), RECORD, COMPLETIONS, {})
    assert one.got == other.got == [wanted]


def test_callbacks_without_the_method_are_allowed():
    recorder([TrainerCallback()]).write(RECORD, COMPLETIONS, **WHERE)
    recorder([]).write(RECORD, COMPLETIONS, **WHERE)


def test_callbacks_that_come_later_get_the_later_records():
    first, late = Keeps(), Keeps()
    callbacks = [first]
    writes = recorder(callbacks)
    writes.write(RECORD, [], **WHERE)
    callbacks.append(late)
    writes.write(RECORD, COMPLETIONS, **WHERE)
    assert [got[-2] for got in first.got] == [[], COMPLETIONS] and [got[-2] for got in late.got] == [COMPLETIONS]


def test_a_record_that_cannot_be_written_raises():
    kept = Keeps()
    with pytest.raises(SaveError, match="the disk is full"):
        recorder([kept, FullDisk()]).write(RECORD, COMPLETIONS, **WHERE)
    assert len(kept.got) == 1


def test_other_errors_of_a_callback_are_not_converted():
    class Wrong(Keeps):
        def on_record(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recorder([Wrong()]).write(RECORD, COMPLETIONS, **WHERE)


def test_only_the_main_process_writes():
    kept = Keeps()
    recorder([kept, FullDisk()], main=False).write(RECORD, COMPLETIONS, **WHERE)
    assert kept.got == []
