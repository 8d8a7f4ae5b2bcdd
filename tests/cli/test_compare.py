"""`trustkl compare`: arguments, exit statuses, output and files."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.compare.jobs import GRPO_TASK, TASK, Endless, Instant, InThisProcess, yaml_file
from tests.processes import ROOT
from trl_trustkl import load_records
from trl_trustkl.cli import compare as command
from trl_trustkl.cli import main
from trl_trustkl.compare import child, page, terminal
from trl_trustkl.compare.runner import Job
from trl_trustkl.errors import ConfigError


def invoke(folder: Path, *arguments: str, start: Any = None) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(["--output-dir", str(folder), "--task", TASK, "--updates", "3", *arguments])
    return command.run(options, start or Instant())


def test_the_command_makes_a_comparison_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = Instant()
    assert invoke(tmp_path, "--seeds", "1", "2", start=start) == 0
    out = capsys.readouterr().out
    assert len(start.started) == 8 and "finished  neither, seed 2" in out and "(8 of 8 runs)" in out
    assert "anchor + clip" in out and "0.40" in out and "± 0.00" in out and "Score, KL to the reference" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line), out
    assert "\x1b" not in out
    for name in (page.PAGE_FILE, page.CSV_FILE, page.MARKDOWN_FILE):
        assert (tmp_path / name).exists() and str(tmp_path / name) in out
    again = Instant()
    assert invoke(tmp_path, "--seeds", "1", "2", "3", start=again) == 0
    assert {entry[1] for entry in again.started} == {3} and "8 of 12 runs are finished" in capsys.readouterr().out


def test_the_command_reports_a_failed_run_and_compares_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(tmp_path, start=Instant(fails=lambda job: job.setting == "clip only")) == 1
    out = capsys.readouterr().out
    assert "FAILED    clip only, seed 42" in out and "\x1b" not in out
    assert "Failed: clip only, seed 42: ValueError: \\x1b[31mno luck" in out
    assert f"log: {tmp_path / 'clip-only' / 'seed-42' / 'run.log'}" in out
    assert len(list(csv.reader((tmp_path / page.CSV_FILE).open()))) == 1 + 3
    assert invoke(tmp_path / "all", start=Instant(fails=lambda _: True)) == 1
    assert not (tmp_path / "all" / page.PAGE_FILE).exists()


def test_ctrl_c_ends_the_children_and_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    instant, endless = Instant(), Endless()

    def start(job: Job, threads: int) -> Any:
        return instant(job, threads) if job.setting == "anchor + clip" else endless

    def interrupt(live: terminal.Live, updates: int) -> None:
        if (tmp_path / "anchor-and-clip" / "seed-42" / child.DONE_FILE).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Live, "progress", interrupt)
    assert invoke(tmp_path, start=start) == 130
    assert endless.over.is_set() and "the same command resumes from here" in capsys.readouterr().out
    monkeypatch.undo()
    rest = Instant()
    assert invoke(tmp_path, start=rest) == 0
    assert [entry[0] for entry in rest.started] == ["clip only", "anchor only", "neither"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "0"], "`--processes` got 0"),
        (["--limit", "nan"], "`--limit` got nan"),
        (["--limit", "0"], "`--limit` got 0.0; it must be a positive number of nats per token"),
        (["--last", "4"], "`--last` got 4; it must be at most the 3 updates of a run"),
        (["--seeds", "1", "1"], "`seeds` got 1 twice"),
        (["--task", "x"], "`task` got 'x'"),
    ],
)
def test_what_the_command_rejects_before_any_run_starts(tmp_path: Path, arguments: list[str], said: str) -> None:
    start = Instant()
    with pytest.raises(ConfigError) as error:
        invoke(tmp_path, *arguments, start=start)
    assert said in str(error.value) and not start.started and not list(tmp_path.iterdir())


def test_an_error_of_the_comparison_sets_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(yaml_file(tmp_path, "seed: 1"))]) == 2
    assert "Did you mean 'seeds'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_in_real_processes_stops_and_resumes(tmp_path: Path) -> None:
    import signal

    code = "import sys; from trl_trustkl.cli import main; sys.exit(main())"
    arguments = ["--output-dir", str(tmp_path), "--task", TASK, "--updates", "2", "--processes", "2"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, "compare", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=ROOT,
        )  # fmt: skip

    process, deadline = begin(), time.monotonic() + 300
    while not list(tmp_path.rglob(child.DONE_FILE)) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out, out
    finished = len(list(tmp_path.rglob(child.DONE_FILE)))
    process = begin()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"{finished} of 4 runs are finished" in out, out
    assert (tmp_path / page.PAGE_FILE).exists()


def test_settings_of_grpo_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
trainer: grpo
common: {learning_rate: 0.05}
settings:
  limit: {trust_max_kl: 0.01}
  none: {num_iterations: 2}
"""
    file = yaml_file(tmp_path, text)
    assert invoke(tmp_path / "out", str(file), "--task", GRPO_TASK, "--updates", "4", start=InThisProcess) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if not line.startswith("{") and str(tmp_path) not in line]
    assert any("limit" in line for line in lines) and all(len(line) <= 80 for line in lines)
    for name, bound in (("limit", 0.01), ("none", None)):
        records = load_records(tmp_path / "out" / name / "seed-42")
        assert {record["trainer"] for record in records} == {"GRPOTrainer"}
        assert {record["trust"]["guaranteed"] for record in records} == {bound}
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "nan" not in page.lower().split("<main>")[1].split("<svg")[0].replace("guaranteed", "")


def test_rloo_needs_a_task(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match="--task is required with `trainer: rloo`"):
        command.prepare(parser.parse_args([str(yaml_file(tmp_path, "trainer: rloo"))]))
