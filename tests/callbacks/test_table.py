"""The table of updates: its lines fit a terminal, and no text of a record can control the terminal."""

from __future__ import annotations

import sys

import pytest

from tests import tiny
from tests.callbacks.terminal import Terminal
from tests.example_runs import record
from trl_trustkl import BoundReportCallback, load_records
from trl_trustkl.callbacks import table
from trl_trustkl.callbacks.table import HEADER, line


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": 9999, "score": -0.999, "binding": "grad_norm"},
        {"score": None, "binding": "backtrack"},
        {"refused": "the KL(π_old‖π) measured after it is not finite"},
        {"trust": record().trust._replace(max_ratio=7.5e12, kl=12.3456, gated=1.0)},
        {"anchor": record().anchor._replace(kl_exact=1234.5, target=1e6)},
        {"anchor": record().anchor._replace(kl_exact=99.99, coef=99.999, share=None, target=None)},
    ],
)
def test_a_line_of_the_table_fits_a_terminal_of_80_columns(changes):
    text = line(record(**changes))
    assert len(HEADER) <= 80 and len(text) <= 80, text


def test_without_a_terminal_the_table_has_a_plain_line_for_each_record(tmp_path, capsys):
    tiny.trainer(tmp_path, callbacks=[BoundReportCallback(report=False, table=True)]).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert lines[0] == table.HEADER
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    rows = load_records(tmp_path)
    assert [line.split()[1] for line in lines[1:]] == [f"{row['score']:+.3f}" for row in rows]
    assert [float(line.split()[2]) for line in lines[1:]] == [round(row["anchor"]["kl_exact"], 2) for row in rows]


@pytest.mark.parametrize("rich", [True, False])
def test_no_text_of_a_record_controls_the_terminal(monkeypatch, rich):
    hostile = "\x1b]0;title\x07[red]\x1b[2J\n\r\u202eabc"
    out = Terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", out)
        show = table.printer(progress_bar=False)
        show(table.line(record(binding=hostile[4:])), None)
        show(table.line(record(refused=hostile)), "yellow")
    assert (show is not table._plain) == rich
    assert out.text.replace("\n", "").isprintable() and out.text.count("\n") == 2
    assert "title\\x07[r" in out.text and "rejected: \\…" in out.text


def test_lines_go_plainly_above_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert table.printer(progress_bar=True) is table._plain


def test_a_target_per_token_is_shown_with_the_kl_per_token():
    """That of GRPO and RLOO, whose users give it so; the record's length is 20 tokens."""
    anchor = record().anchor._replace(target_per_token=0.125, target=2.5, kl_exact=6.0)
    shown = line(record(anchor=anchor))
    assert shown.split()[2:4] == ["0.30", "0.125"] and len(shown) <= 80
    assert "nan" in line(record(anchor=anchor, length=0.0))
