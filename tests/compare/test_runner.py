"""The runs of a comparison: their order, which of them are repeated, their processes, and their failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.jobs import TASK, TWO, Endless, Instant, Silent, make
from trl_trustkl.compare import child, settings
from trl_trustkl.compare.runner import Job, Runner, differences, jobs, start_process, unfinished
from trl_trustkl.errors import DataError


def test_every_setting_has_a_run_before_any_has_two(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    assert [(job.setting, job.seed) for job in planned] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert planned[2].folder == tmp_path / "a" / "seed-2"
    outcomes, reporter = make(planned, Instant())
    assert [outcome.job for outcome in outcomes] == reporter.begun == planned
    assert reporter.updates[-1] == 12 and not unfinished(planned)


def test_finished_runs_are_kept_and_incomplete_runs_repeated(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    make(planned, Instant())
    half = planned[1].folder
    (half / child.DONE_FILE).unlink()
    (half / "left over").write_text("")
    kept = {job.folder: (job.folder / "bounds.jsonl").stat().st_mtime_ns for job in planned if job.folder != half}
    left = unfinished(planned)
    assert left == [planned[1]]
    make(left, Instant())
    assert not (half / "left over").exists() and not unfinished(planned)
    assert all((folder / "bounds.jsonl").stat().st_mtime_ns == when for folder, when in kept.items())


def test_runs_made_under_other_settings_are_rejected_and_replaced_on_demand(tmp_path: Path) -> None:
    make(jobs(TWO, tmp_path, TASK), Instant())
    other = TWO._replace(updates=4, settings={"a": {"kl_coef": 0.1}, "b": {"kl_coef": 0.3, "lam": 0.9}})
    planned = jobs(other, tmp_path, TASK)
    with pytest.raises(DataError) as error:
        unfinished(planned)
    said = str(error.value)
    assert f"{tmp_path / 'a' / 'seed-1'} was made with updates 3, now 4\n" in said
    assert "kl_coef 0.2, now 0.3; lam left open, now 0.9; updates 3, now 4" in said and "--overwrite" in said
    assert unfinished(planned, overwrite=True) == planned
    make(
        unfinished(jobs(TWO._replace(seeds=(1,)), tmp_path, TASK)), Instant()
    )  # fewer seeds do not count as other settings


def test_equal_settings_have_no_differences() -> None:
    made_with = {"config": {"kl_coef": 0.0}, "updates": 3}
    assert differences(made_with, {"config": {"kl_coef": 0}, "updates": 3}) == []
    assert differences(made_with, {"config": {}, "updates": 3}) == ["kl_coef 0.0, now left open"]
    assert differences({"a": None}, {}) == ["a None, now left open"]


def test_a_folder_with_other_files_is_left_unchanged(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    planned[3].folder.mkdir(parents=True)
    (planned[3].folder / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists but contains no run of a comparison"):
        make(planned, Instant())
    assert (planned[3].folder / "thesis.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_the_others_running(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    outcomes, reporter = make(planned, Instant(fails=lambda job: job.setting == "a"), processes=2)
    assert [outcome.error for outcome in outcomes] == ["ValueError: \x1b[31mno luck\x1b[0m", None] * 2
    assert len(reporter.over) == 4 and unfinished(planned) == [planned[0], planned[2]]


def test_an_interruption_ends_the_running_processes_and_starts_no_others(tmp_path: Path) -> None:
    planned, begun = jobs(TWO, tmp_path, TASK), []

    class Interrupting(Silent):
        def progress(self, updates: int) -> None:
            if len(begun) == 2:
                raise KeyboardInterrupt

    def start(job: Job, threads: int) -> Endless:
        begun.append(job)
        return Endless()

    with pytest.raises(KeyboardInterrupt), Runner(2, Interrupting(), start) as runner:
        runner.run(planned, every=0.01)
    assert len(begun) == 2
    assert unfinished(planned) == planned


def test_cores_are_divided_among_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_trustkl.compare.runner.cores", lambda: 8)
    planned = jobs(TWO, tmp_path, TASK)
    for processes, threads in ((1, 8), (3, 2), (9, 1)):
        start = Instant()
        make(planned, start, processes)
        assert {entry[2] for entry in start.started} == {threads}


@pytest.mark.processes
def test_a_run_in_a_separate_process_and_its_error(tmp_path: Path) -> None:
    """A real process that fails before it builds a model; its outcome has the last line of the error."""
    wrong = settings.Comparison(1, (1,), {"a": {}})
    planned = jobs(wrong, tmp_path, "tests.nowhere:f")
    (outcome,), _ = make(planned, start_process)
    assert outcome.error is not None and "trl_trustkl.errors.ConfigError: `task` got 'tests.nowhere:f'" in outcome.error
    assert "Traceback" in (tmp_path / "a" / "seed-1" / "run.log").read_text()
