"""The comparison: what is compared, every run made once, numbers that are right, and no sentence they do not support."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.test_findings import Row, completions_of, rows_of, write_run
from tests.test_report import ATTACKS, SAMPLE_KEYS, Page
from trl_trustkl.cli import compare as command
from trl_trustkl.cli import main
from trl_trustkl.compare import child, figures, metrics, page, settings, tables, task, terminal
from trl_trustkl.compare.conclusions import Corners, conclude, corners, gap
from trl_trustkl.compare.metrics import METRICS, Result, of_run, result, spread
from trl_trustkl.compare.runner import Job, Outcome, Runner, differences, jobs, start_process, unfinished
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.report import read_run
from trl_trustkl.report.text import markdown

TASK = "tests.test_compare:tiny_task"


def tiny_task(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Any:
    return tiny.trainer(output_dir, changes=changes, callbacks=list(callbacks))


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_four_corners_by_default() -> None:
    by_default = settings.validate(settings.read())
    assert (by_default.updates, by_default.seeds) == (20, (42,))
    switched = [(fields["kl_coef"] > 0, fields["clip_rule"] != "none") for fields in by_default.settings.values()]
    assert switched == [(True, True), (False, True), (True, False), (False, False)]
    assert [settings.slug(name) for name in by_default.settings][:2] == ["anchor-and-clip", "clip-only"]


def test_a_file_with_everything_and_what_the_command_line_changes(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "updates: 7\nseeds: [1, 2]\ncommon: {learning_rate: 1e-4, cliprange: 0.1}\n"
        "settings:\n  a: {cliprange: 0.3, clip_kwargs: {}}\n  b: {}\n",
    )
    found = settings.validate(settings.read(file))
    assert (found.updates, found.seeds) == (7, (1, 2))
    # 1e-4 without a point is text to YAML 1.1, and a number to everybody else
    assert found.settings == {
        "a": {"learning_rate": 1e-4, "cliprange": 0.3, "clip_kwargs": {}},
        "b": {"learning_rate": 1e-4, "cliprange": 0.1},
    }
    changed = settings.read(file, updates=3, seeds=[9])
    assert (changed.updates, changed.seeds) == (3, (9,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing; it must be a mapping"),
        ("{}", "holds a dict; it must be a mapping with any of updates"),
        ("- 1", "holds a list"),
        ("a: [1", "is not YAML: while parsing a flow sequence"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
        ("seed: 1", "got 'seed'; it must be one of 'common', 'seeds', 'settings', 'updates'. Did you mean 'seeds'?"),
        ("updates: 2\nupdates: 3", "the key 'updates' stands twice"),
        ("settings: {a: {kl_coef: 1}, a: {}}", "the key 'a' stands twice"),
        ("updates: 0", "`updates` got 0; it must be an integer from 1"),
        ("updates: true", "`updates` got True"),
        ("updates: 2.5", "`updates` got 2.5"),
        ("seeds: 42", "`seeds` got 42; it must be a list of integers. One seed is seeds: [42]."),
        ("seeds: []", "`seeds` got []"),
        ("seeds: [1, x]", "`seeds` got 'x'"),
        ("seeds: [-1]", "`seeds` got -1"),
        ("seeds: [1, 2, 1]", "`seeds` got 1 twice"),
        ("settings: {}", "`settings` got {}; it must be a mapping with an entry. Fix: leave it out."),
        ("common:", "`common` got None"),
        ("settings: {a: }", "`settings → a` got None; it must be a mapping of configuration fields. {} is the task as it"),
        ("settings: {1: {}}", "`settings` got 1; it must be a name with a letter or a digit, at most 60 characters of "
         "text. Put a number in quotes."),
        ("settings: {'--': {}}", "`settings` got '--'"),
        (f"settings: {{{'x' * 61}: {{}}}}", "at most 60 characters"),
        ("settings: {a b: {}, a-B: {}}", "got 'a b' and 'a-B', which would share the folder 'a-b'"),
        ("settings: {a: {seed: 1}}", "got 'seed', which the comparison sets itself; use `seeds` instead"),
        ("common: {max_steps: 1}", "use `updates` instead"),
        ("settings: {a: {kl_coeff: 1}}", "setting 'a': `field of TrustKLPPOConfig` got 'kl_coeff'"),
        ("settings: {a: {kl_coeff: 1}}", "Did you mean 'kl_coef'?"),
        ("settings: {a: {clip_rule: pop}}", "setting 'a': `clip_rule` got 'pop'"),
        ("settings: {a: {kl_coef: much}}", "`kl_coef` got 'much'; it must be a finite number"),
        ("settings: {a: {kl_coef: -1}}", "`kl_coef` got -1; it must be a finite number >= 0"),
        ("settings: {a: {kl_coef: .nan}}", "setting 'a': Out of range float"),
        ("settings: {a: {num_ppo_epochs: 1.5}}", "`num_ppo_epochs` got 1.5; it must be an integer"),
        ("settings: {a: {whiten_advantages: 'yes'}}", "`whiten_advantages` got 'yes'; it must be true or false"),
        ("settings: {a: {kl_estimator: 3}}", "`kl_estimator` got 3"),
        ("settings: {a: {kl_target: 6}}", "`kl_target` got 6, but kl_controller='fixed' never looks at it"),
        ("settings: {a: {clip_kwargs: 2020-01-01}}", "setting 'a': Object of type date"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_an_error_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.validate(settings.read(yaml_file(tmp_path, text)))
    assert said in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read: No such file"):
        settings.read(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not YAML: unacceptable character"):
        settings.read(tmp_path / "bytes")


def test_the_tasks_own_configuration_decides_where_it_is_known() -> None:
    """16 mini-batches are right for the demo's task, and too many for the configuration's defaults."""
    from trl_trustkl.demo.task import sentiment_config

    asked = settings.Comparison(1, (1,), {"a": {"num_mini_batches": 16}})
    assert settings.validate(asked, sentiment_config).settings == asked.settings
    with pytest.raises(ConfigError, match="`num_mini_batches` got 32"):
        settings.validate(asked._replace(settings={"a": {"num_mini_batches": 32}}), sentiment_config)


# -- task --------------------------------------------------------------------------------------------------------------


def test_a_task_by_module_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task.load(TASK).__name__ == "tiny_task"
    assert callable(task.load(task.SENTIMENT))
    (tmp_path / "mine.py").write_text("def train(output_dir, **changes): return output_dir\n")
    monkeypatch.chdir(tmp_path)
    found = task.resolve("mine.py:train")
    assert found == f"{tmp_path / 'mine.py'}:train"
    assert task.load(found)("x", callbacks=(), seed=1) == "x"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "it must be module:function or path/to/file.py:function"),
        ("tests.tiny:", "it must be module:function"),
        (
            "tests.nowhere:f",
            "there is no module 'tests.nowhere' to import; it must be module:function or path/to/file.py",
        ),
        ("/nowhere/x.py:f", "`task` got the file '/nowhere/x.py'; there is no such file"),
        ("tests.test_compare:tiny_tsk", "'tiny_tsk' does not exist. Did you mean 'tiny_task'?"),
        ("tests.tiny:good_words", "which cannot be called as (output_dir, *, callbacks=(), **config_changes)"),
        ("tests.tiny:VOCAB", "'VOCAB' is not callable"),
    ],
)
def test_a_task_that_cannot_be_run(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        task.load(name)
    assert said in str(error.value)


# -- runs --------------------------------------------------------------------------------------------------------------


class Silent:
    def __init__(self) -> None:
        self.begun: list[Job] = []
        self.over: list[Outcome] = []
        self.updates: list[int] = []

    def started(self, job: Job) -> None:
        self.begun.append(job)

    def ended(self, outcome: Outcome) -> None:
        self.over.append(outcome)

    def progress(self, updates: int) -> None:
        self.updates.append(updates)


class Instant:
    """A process that has made its run by the time it is waited for; `fails` says which end as a failed run does."""

    def __init__(self, rows: Callable[[Job], list[Row]] | None = None, fails: Callable[[Job], bool] = lambda _: False):
        self.rows = rows or (lambda job: rows_of(job.made_with["updates"]))
        self.fails, self.started = fails, []

    def __call__(self, job: Job, threads: int) -> Instant:
        self.started.append((job.setting, job.seed, threads))
        process = Instant(self.rows, self.fails)
        process.job = job
        return process

    def wait(self, timeout: float | None = None) -> int:
        rows = self.rows(self.job)
        if self.fails(self.job):
            write_run(self.job.folder, rows[:1])
            log = "Traceback …\nValueError: \x1b[31mno luck\x1b[0m\n\n"
            (self.job.folder / "run.log").write_text(log, encoding="utf-8")
            return 1
        write_run(self.job.folder, rows, completions_of(rows))
        child.write(self.job.folder / child.DONE_FILE, self.job.made_with)
        return 0

    def terminate(self) -> None: ...

    kill = terminate


TWO = settings.Comparison(3, (1, 2), {"a": {"kl_coef": 0.1}, "b": {"kl_coef": 0.2}})


def make(planned: Sequence[Job], start: Any, processes: int = 1) -> tuple[list[Outcome], Silent]:
    reporter = Silent()
    with Runner(processes, reporter, start) as runner:
        return runner.run(planned, every=0.01), reporter


def test_every_setting_has_a_run_before_any_has_two(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    assert [(job.setting, job.seed) for job in planned] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert planned[2].folder == tmp_path / "a" / "seed-2"
    outcomes, reporter = make(planned, Instant())
    assert [outcome.job for outcome in outcomes] == reporter.begun == planned
    assert reporter.updates[-1] == 12 and not unfinished(planned)


def test_finished_runs_are_kept_and_half_runs_made_anew(tmp_path: Path) -> None:
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


def test_runs_made_under_other_settings_are_refused_and_replaced_on_demand(tmp_path: Path) -> None:
    make(jobs(TWO, tmp_path, TASK), Instant())
    other = TWO._replace(updates=4, settings={"a": {"kl_coef": 0.1}, "b": {"kl_coef": 0.3, "lam": 0.9}})
    planned = jobs(other, tmp_path, TASK)
    with pytest.raises(DataError) as error:
        unfinished(planned)
    said = str(error.value)
    assert f"{tmp_path / 'a' / 'seed-1'} was made with updates 3, now 4\n" in said
    assert "kl_coef 0.2, now 0.3; lam left open, now 0.9; updates 3, now 4" in said and "--overwrite" in said
    assert unfinished(planned, overwrite=True) == planned
    make(unfinished(jobs(TWO._replace(seeds=(1,)), tmp_path, TASK)), Instant())  # fewer seeds are no other settings


def test_equal_settings_have_no_differences() -> None:
    made_with = {"config": {"kl_coef": 0.0}, "updates": 3}
    assert differences(made_with, {"config": {"kl_coef": 0}, "updates": 3}) == []
    assert differences(made_with, {"config": {}, "updates": 3}) == ["kl_coef 0.0, now left open"]
    assert differences({"a": None}, {}) == ["a None, now left open"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    planned[3].folder.mkdir(parents=True)
    (planned[3].folder / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is in the way: it holds no run of a comparison"):
        make(planned, Instant())
    assert (planned[3].folder / "thesis.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_the_others_running(tmp_path: Path) -> None:
    planned = jobs(TWO, tmp_path, TASK)
    outcomes, reporter = make(planned, Instant(fails=lambda job: job.setting == "a"), processes=2)
    assert [outcome.error for outcome in outcomes] == ["ValueError: \x1b[31mno luck\x1b[0m", None] * 2
    assert len(reporter.over) == 4 and unfinished(planned) == [planned[0], planned[2]]


class Endless:
    """A process that runs until it is told to end."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        assert self.over.wait(30 if timeout is None else timeout)
        return -15

    def terminate(self) -> None:
        self.over.set()

    kill = terminate


def test_leaving_ends_what_runs_and_begins_nothing_more(tmp_path: Path) -> None:
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


def test_a_child_trains_what_its_folder_says(tmp_path: Path) -> None:
    made_with = {"task": TASK, "updates": 2, "seed": 5, "config": {"kl_coef": 0.3, "clip_rule": "none"}}
    child.write(tmp_path / child.SETTINGS_FILE, made_with)
    child.run(tmp_path)
    run = read_run(tmp_path)
    assert [record.update for record in run.records] == [1, 2]
    assert {(record.anchor.coef, record.trust.rule) for record in run.records} == {(0.3, "none")}
    assert json.loads((tmp_path / child.DONE_FILE).read_text()) == made_with


def test_a_process_of_its_own_and_its_error(tmp_path: Path) -> None:
    """Real processes, which fail before they build a model: what reaches the parent is the error's last line."""
    wrong = settings.Comparison(1, (1,), {"a": {}})
    planned = jobs(wrong, tmp_path, "tests.nowhere:f")
    (outcome,), _ = make(planned, start_process)
    assert outcome.error is not None and "trl_trustkl.errors.ConfigError: `task` got 'tests.nowhere:f'" in outcome.error
    assert "Traceback" in (tmp_path / "a" / "seed-1" / "run.log").read_text()


def test_a_child_ends_with_its_parent() -> None:
    code = "import time; from trl_trustkl.compare.child import end_with_parent; end_with_parent(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stdin is not None
    process.stdin.close()  # as the end of the parent does, however it comes
    assert process.wait(timeout=60) == 143


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_against_an_independent_computation(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    rows = rows_of(8)
    words = ["a", "b", "c", "d", "e"]
    texts: dict[int, list[str]] = {}
    likely: dict[int, list[float]] = {}
    kept = []
    for row in rows:
        row["score"], row["length"] = float(draws.normal()), float(draws.uniform(5, 9))
        row["anchor"]["kl_exact"] = float(draws.uniform(1, 9))
        row["trust"] |= {"kl": float(draws.uniform(0.0, 0.04)), "max_ratio": float(draws.uniform(1, 50))}
        for _ in range(3):
            text = " ".join(draws.choice(words, size=draws.integers(1, 6)))
            ref_logp = float(draws.uniform(-60, -20))
            texts.setdefault(row["update"], []).append(text)
            likely.setdefault(row["update"], []).append(ref_logp)
            kept.append({**SAMPLE_KEYS, "update": row["update"], "completion": text, "ref_logp": ref_logp})
    found = of_run(read_run(write_run(tmp_path, rows, kept)), last=3, limit=0.02)

    end = rows[-3:]
    assert found["score_first"] == pytest.approx(statistics.fmean(row["score"] for row in rows[:3]))
    assert found["score"] == pytest.approx(statistics.fmean(row["score"] for row in end))
    assert found["kl"] == pytest.approx(statistics.fmean(row["anchor"]["kl_exact"] for row in end))
    assert found["update_kl"] == max(row["trust"]["kl"] for row in rows)
    assert found["over_limit"] == sum(row["trust"]["kl"] > 0.02 for row in rows) / 8
    assert found["ratio"] == max(row["trust"]["max_ratio"] for row in rows)
    assert found["ref_logp"] == pytest.approx(
        statistics.fmean(statistics.fmean(likely[row["update"]]) / row["length"] for row in end)
    )
    pairs = [
        f"{first} {second}"
        for row in end
        for text in texts[row["update"]]
        for first, second in zip(text.split(), text.split()[1:], strict=False)
    ]
    singles = " ".join(" ".join(texts[row["update"]]) for row in end).split()
    assert found["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert found["distinct_1"] == pytest.approx(len(set(singles)) / len(singles))
    assert set(found) == set(METRICS)


def test_distinct_n_by_hand() -> None:
    assert metrics.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert metrics.distinct(["a b a b", "a b"], 1) == 2 / 6
    assert math.isnan(metrics.distinct(["a", ""], 2))


def test_a_run_without_scores_or_completions_has_gaps_and_no_crash(tmp_path: Path) -> None:
    found = of_run(read_run(write_run(tmp_path, rows_of(3, score=None, trust__kl=None))), last=2)
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "score_first", "score", "update_kl", "over_limit", "ref_logp", "distinct_1", "distinct_2",
    }  # fmt: skip


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread(np.array([1.0, 3.0, 8.0])) == pytest.approx(statistics.stdev([1, 3, 8]))
    assert spread(np.array([1.0, 3.0, np.nan])) == pytest.approx(math.sqrt(2))
    assert math.isnan(spread(np.array([1.0]))) and math.isnan(spread(np.array([])))


def test_what_was_on_is_read_from_the_records(tmp_path: Path) -> None:
    off = read_run(write_run(tmp_path / "off", rows_of(2, anchor__coef=0.0, trust__rule="none")))
    on = read_run(write_run(tmp_path / "on", rows_of(2)))
    rule = read_run(write_run(tmp_path / "rule", rows_of(2, trust__rule="spo")))
    found = [result("x", {}, {1: run}, last=1) for run in (off, on, rule)]
    assert [(each.anchored, each.clipped, each.clip_end) for each in found] == [
        (False, False, None), (True, True, 1.2), (True, True, None),
    ]  # fmt: skip


# -- conclusions -------------------------------------------------------------------------------------------------------

FLAT = {"score": 0.5, "kl": 8.0, "update_kl": 0.05, "ratio": 1.1, "ref_logp": -3.0}
NOISE = (-0.01, 0.0, 0.01)
SWITCHES = {
    "both": (True, True), "clip": (False, True), "anchor": (True, False), "neither": (False, False),
}  # fmt: skip


def synthetic(
    name: str, seeds: int = 3, *, config: dict[str, Any] | None = None, noise: float = 1.0, **values: float
) -> Result:
    """A setting whose seeds scatter by a hundredth around the values."""
    anchored, clipped = SWITCHES.get(name, (True, True))
    rows = {
        seed: dict.fromkeys(METRICS, math.nan)
        | {metric: value * (1 + noise * NOISE[seed]) for metric, value in {**FLAT, **values}.items()}
        for seed in range(seeds)
    }
    config = {"kl_coef": 0.05 if anchored else 0.0, "clip_rule": "ppo" if clipped else "none"}
    return Result(name, config, anchored, clipped, 1.2 if clipped else None, rows, {})


def four(seeds: int = 3, noise: float = 1.0, **changed: dict[str, float]) -> list[Result]:
    return [synthetic(name, seeds, noise=noise, **changed.get(name, {})) for name in SWITCHES]


NO_ANCHOR = {"clip": {"kl": 36.0}, "neither": {"kl": 101.0}}
NO_CLIP = {"anchor": {"update_kl": 0.5}, "neither": {"kl": 101.0, "update_kl": 1.5}}
CASES: list[tuple[str, list[Result], list[str], list[str]]] = [
    # what the case is, the results, what is said, what is not said
    ("nothing differs", four(),
     ["By score, no two settings are told apart (0.50 to 0.50)",
      "Taking the anchor away did not clearly change KL to the reference, reference log-likelihood and score.",
      "No ratio was above the clip's range; the clip does not guarantee it."],
     ["higher", "lower", "So the anchor", "highest", "did not hold"]),
    ("the anchor matters", four(**NO_ANCHOR),
     ["Without the anchor the KL to the reference was higher, with the clip (36 against 8 nats/response, ",
      "and without it (101 against 8 nats/response, ",
      "By KL to the reference, 5 of 6 pairs of settings are told apart: it was highest with neither (101) and lowest with "],
     ["So the anchor", "score was higher", "update KL was higher"]),
    ("each matters", four(**NO_ANCHOR | NO_CLIP),
     ["Without the clip the largest update KL was higher, with the anchor (0.5 against 0.05 nats/token, ",
      "So the anchor kept the policy nearer to the reference, and the clip kept updates smaller, each of them with"],
     ["Without the clip the largest ratio was higher"]),
    ("the anchor matters with the clip only", four(clip={"kl": 36.0}),
     ["KL to the reference was higher with the clip (36 against 8 nats/response, ",
      "and not clearly different without it (8 against 8 nats/response)."], ["So the anchor", "lower"]),
    ("opposite effects", four(clip={"score": 0.9}, neither={"score": 0.1}),
     ["Without the anchor the score was higher with the clip (0.90 against 0.50, ", "and lower without it (0.10 against 0.50, ",
      "Without the clip the score was not clearly different with the anchor (0.50 against 0.50), and lower without it"],
     ["So the anchor"]),
    ("a difference within the spread", four(noise=40.0, **NO_CLIP | {"clip": {"kl": 9.0}}),
     ["By score, no two settings are told apart"], ["higher with the clip", "So the anchor"]),
    ("the likelihood fell", four(clip={"ref_logp": -4.0}, neither={"ref_logp": -5.0}),
     ["Without the anchor the reference log-likelihood was lower, with the clip (-4.00 against -3.00 nats/token, "],
     ["likelihood was higher"]),
    ("the clip did not hold", four(both={"ratio": 131.0}, clip={"ratio": 129.0}),
     ["The clip did not hold the ratio in its range: with both the largest was 132, and the range ends at 1.2."],
     ["No ratio was above"]),
    ("no clip at all", [synthetic("anchor"), synthetic("neither", kl=50.0)],
     ["By KL to the reference, the two are told apart: it was highest with neither (50) and lowest with anchor (8), "],
     ["clip's range", "did not hold", "Without the"]),
    ("one seed", four(1, **NO_ANCHOR),
     ["of one seed: without a spread",
      "Without the anchor the KL to the reference was higher, with the clip (35.6 against 7.92"],
     [" SD", "standard deviation", "So the anchor"]),
    ("one seed, less than a tenth", four(1, clip={"kl": 8.5}, neither={"kl": 8.5}),
     ["Taking the anchor away did not clearly change KL to the reference,",
      "no two settings are a tenth or more apart (7.92 to"],
     ["higher"]),
    ("not corners", [synthetic("x"), synthetic("y", score=0.9), synthetic("z", score=0.7)],
     ["By score, 3 of 3 pairs of settings are told apart: it was highest with y (0.90) and lowest with x (0.50), "],
     ["Without the"]),
    ("one setting", [synthetic("x")], ["over 3 seeds"], ["pairs", "the two", "Without"]),
]  # fmt: skip


@pytest.mark.parametrize(("results", "said", "unsaid"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_sentence_is_said_where_the_numbers_support_it(
    results: list[Result], said: list[str], unsaid: list[str]
) -> None:
    text = conclude(results, last=5)
    for part in said:
        assert part in text, text
    for part in unsaid:
        assert part not in text.partition("do not overlap.")[2 if "do not overlap." in text else 0], text


def test_a_gap_counts_pooled_standard_deviations_and_needs_disjoint_ranges() -> None:
    def of(*values: float) -> Result:
        rows = {seed: dict.fromkeys(METRICS, value) for seed, value in enumerate(values)}
        return Result("x", {}, True, True, None, rows, {})

    found = gap(of(1, 2, 3), of(7, 8, 9), "kl")
    assert found == (1, pytest.approx(6.0))
    pooled = math.sqrt((statistics.variance([1, 2]) + 2 * statistics.variance([4, 6, 9])) / 3)
    found = gap(of(4, 6, 9), of(1, 2), "score")
    assert found == (-1, pytest.approx((19 / 3 - 1.5) / pooled))
    assert (
        gap(of(1, 2, 2, 2, 2, 2, 2, 9), of(8, 9, 9, 9, 9, 9, 9, 9), "kl").sign == 0
    )  # apart, but their ranges overlap
    assert gap(of(1, 3), of(3.5, 5.5), "kl").sign == 0  # ranges apart by chance, means by less than 2
    assert gap(of(1, 1), of(1, 1), "kl") == (0, 0.0)
    assert gap(of(10, 1000), of(1e5, 1e7), "ratio").sds == pytest.approx(2 * math.sqrt(2))  # of the logarithm
    assert gap(of(math.nan), of(1.0), "kl") is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({name: {"lam": 0.9} for name in SWITCHES}, True),
        ({"both": {"lam": 0.9}}, False),
        ({"anchor": {"kl_coef": 0.1}}, False),
        ({"clip": {"cliprange": 0.1}}, False),
        ({"clip": {"trust_max_kl": 0.1}}, False),
    ],
)
def test_four_corners_differ_in_anchor_and_clip_alone(changes: dict[str, dict[str, Any]], found: bool) -> None:
    results = [each._replace(config={**each.config, **changes.get(each.name, {})}) for each in four()]
    got = corners(list(reversed(results)))
    assert (got is not None) is found
    if got is not None:
        assert [each.name for each in got] == list(Corners._fields)
    assert corners(results[:3]) is None and corners([*results[:3], results[0]]) is None


# -- page, files and terminal ------------------------------------------------------------------------------------------


def hostile(folder: Path) -> list[Result]:
    """A setting for each attack, with the attack as its name, in its configuration and in its completions."""
    found = []
    for number, attack in enumerate(ATTACKS):
        rows = rows_of(3)
        for row in rows:
            row["binding"] = row["trust"]["rule"] = attack
        kept = [{**SAMPLE_KEYS, "update": row["update"], "prompt": attack, "completion": attack} for row in rows]
        run = read_run(write_run(folder / str(number), rows, kept))
        found.append(result(attack, {"kl_controller_kwargs": attack}, {1: run, 2: run}, last=1))
    return found


def as_report(results: list[Result], **changes: Any) -> page.Report:
    report = page.Report(results, conclude(results, last=1), "task", 3, 1, 0.02, [])
    return report._replace(**changes)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[page.Report, Path]]:
    folder = tmp_path_factory.mktemp("attacked")
    report = as_report(hostile(folder), task=ATTACKS[0], notes=list(ATTACKS))
    page.save(report, folder)
    yield report, folder


def test_nothing_of_a_completion_or_a_name_acts_on_the_page(attacked: tuple[page.Report, Path]) -> None:
    raw = (attacked[1] / page.PAGE_FILE).read_text("utf-8")
    found = Page(raw)
    assert not {tag for tag, _ in found.elements} & {"script", "iframe", "svg", "object", "base", "link", "form", "a"}
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "href" not in names and "style" not in names
    for _, attributes in found.elements:
        assert (attributes.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    assert not set(raw) & set("\x1b\x07\u202e\u2066\x00")
    assert "<script>alert(1)</script>" in found.text and "\\x1b[2J" in found.text
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_nothing_of_a_completion_acts_in_the_terminal(
    attacked: tuple[page.Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    terminal.show(Console(highlight=False, markup=False, emoji=False, width=80), *attacked)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e\u2066\x00\ud800") and "\\x1b[2J" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(attacked[1]) not in line)


def test_nothing_of_a_completion_is_markup_in_markdown(attacked: tuple[page.Report, Path]) -> None:
    text = (attacked[1] / page.MARKDOWN_FILE).read_text("utf-8")
    assert "<" not in text.replace("&lt;", "") and not set(text) & set("\x1b\x07\u202e")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in rows}
    assert len(rows) == len(ATTACKS) + 2 and cells == {len(METRICS) + 4}
    evil = markdown("[x](javascript:1) ![](http://e) `a` *b* <i> a|b https://e\nnext")
    assert evil == (
        "\\[x\\](javascript:1) \\!\\[\\](\u200bhttp://e) \\`a\\` \\*b\\* &lt;i&gt; a\\|b \u200bhttps://e next"
    )


def ordinary(folder: Path, seeds: Sequence[int] = (1, 2)) -> list[Result]:
    found = []
    for name, score in (("a", 0.2), ("b", 0.6)):
        runs = {}
        for seed in seeds:
            rows = rows_of(4, score=score + seed / 100)
            runs[seed] = read_run(write_run(folder / name / str(seed), rows, completions_of(rows)))
        found.append(result(name, {"kl_coef": score}, runs, last=1))
    return found


def test_the_csv_has_a_line_for_each_run_unrounded(tmp_path: Path) -> None:
    results = ordinary(tmp_path)
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(results))))
    assert [(row["setting"], row["seed"]) for row in rows] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert set(rows[0]) == {"setting", "seed", *METRICS}
    assert [float(row["score"]) for row in rows] == [0.2 + 0.01, 0.2 + 0.02, 0.6 + 0.01, 0.6 + 0.02]
    assert rows[0]["distinct_2"] == ""  # completions of one word have no pairs


def test_the_markdown_has_means_spreads_and_meanings(tmp_path: Path) -> None:
    results = ordinary(tmp_path)
    text = tables.as_markdown(results, "Words.", "last update", 0.02)
    (row,) = [line for line in text.splitlines() if line.startswith("| b |")]
    assert row.startswith("| b | 2 | 0.61 ± 0.01 | 0.61 ± 0.01 | 6 ± 0 |") and row.endswith("| c |")
    assert "exceeded 0.02 nats/token" in text and "sample standard deviation" in text
    one = tables.as_markdown(ordinary(tmp_path / "one", [1]), "Words.", "last update", 0.02)
    assert "| a | 1 | 0.21 ± – |" in one


def test_the_page_says_what_was_compared(tmp_path: Path) -> None:
    report = as_report(ordinary(tmp_path), notes=["a, seed 3 failed: no luck"])
    page.save(report, tmp_path)
    text = Page((tmp_path / page.PAGE_FILE).read_text("utf-8")).text
    assert "2 settings, 3 updates each, seeds 1, 2." in text and "a, seed 3 failed: no luck" in text
    assert report.paragraph in text and "0.61\n± 0.01" in text and "kl_coef" in text
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == {
        f"compare_{name}" for name in figures.PANELS
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e308])
def test_numbers_missing_zero_or_extreme_have_a_page(tmp_path: Path, value: float | None) -> None:
    keys = ("score", "anchor__kl_exact", "trust__kl", "trust__max_ratio")
    run = read_run(write_run(tmp_path / "run", rows_of(2, **dict.fromkeys(keys, value))))
    results = [result(name, {}, {1: run, 2: run}, last=1) for name in ("$x", "_y")]
    page.save(as_report(results), tmp_path)


def test_the_mean_line_covers_runs_of_different_lengths() -> None:
    x, y = figures._mean([(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])), (np.array([2.0]), np.array([4.0]))])
    assert x.tolist() == [1, 2, 3] and y.tolist() == [1, 3, 3]


# -- the command -------------------------------------------------------------------------------------------------------


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
    assert endless.over.is_set() and "the same command goes on from here" in capsys.readouterr().out
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
def test_what_the_command_refuses_before_anything_runs(tmp_path: Path, arguments: list[str], said: str) -> None:
    start = Instant()
    with pytest.raises(ConfigError) as error:
        invoke(tmp_path, *arguments, start=start)
    assert said in str(error.value) and not start.started and not list(tmp_path.iterdir())


def test_an_error_of_the_comparison_is_the_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(yaml_file(tmp_path, "seed: 1"))]) == 1
    assert "Did you mean 'seeds'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_in_real_processes_stops_and_goes_on(tmp_path: Path) -> None:
    import signal

    code = "import sys; from trl_trustkl.cli import main; sys.exit(main())"
    arguments = ["--output-dir", str(tmp_path), "--task", TASK, "--updates", "2", "--processes", "2"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, "compare", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=Path(__file__).parent.parent,
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
