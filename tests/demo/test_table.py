"""The demo's live table."""

from __future__ import annotations

import contextlib
import io

from rich.console import Console
from transformers import TrainerControl, TrainerState

from tests import tiny
from tests.example_runs import record
from trl_trustkl.callbacks.table import HEADER, line
from trl_trustkl.demo.table import LiveReport


def printed(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_line_is_printed_and_kept_for_each_record(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    table = LiveReport(console, total=2)
    state = TrainerState(is_world_process_zero=True)
    table.on_train_begin(tiny.config(tmp_path), state, TrainerControl())
    assert printed(console) == [HEADER]
    for update in (1, 2):
        table.show(record(update, binding="[red]x"))
    assert printed(console)[1:] == [line(each) for each in table.records]
    assert [each.update for each in table.records] == [1, 2]
    assert printed(console)[1].endswith("[red]x"), "the text was read as markup"
    assert table.progress.tasks[0].completed == 2


def test_the_bar_ends_with_the_run_whatever_happens():
    table = LiveReport(Console(file=io.StringIO(), force_terminal=True, width=80), total=2)
    with contextlib.suppress(KeyboardInterrupt), table.progress:
        assert table.progress.live.is_started
        raise KeyboardInterrupt
    assert not table.progress.live.is_started
    assert table.report is True, "the demo does not ask for a report"
