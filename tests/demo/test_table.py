"""The demo's live table."""

from __future__ import annotations

import io

from rich.console import Console

from tests.example_runs import record
from trl_trustkl.callbacks.table import HEADER, line
from trl_trustkl.demo.table import LiveReport


def printed(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_line_is_printed_and_kept_for_each_record():
    console = Console(file=io.StringIO(), width=80)
    with LiveReport(console, total=2) as table:
        assert printed(console) == [HEADER]
        for update in (1, 2):
            table.show(record(update, binding="[red]x"))
    assert printed(console)[1:] == [line(each) for each in table.records] and [r.update for r in table.records] == [
        1,
        2,
    ]
    assert printed(console)[1].endswith("[red]x"), "the text was read as markup"
    assert table.progress.tasks[0].completed == 2


def test_the_bar_ends_with_the_table_whatever_happens():
    table = LiveReport(Console(file=io.StringIO(), force_terminal=True, width=80), total=2)
    try:
        with table:
            assert table.progress.live.is_started
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not table.progress.live.is_started
    assert table.report is True, "the demo does not ask for a report"
