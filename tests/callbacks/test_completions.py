"""`log_completions`: the table of completions in the terminal and in trackers."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.callbacks import completions
from trl_trustkl.callbacks.completions import CompletionsCallback, as_columns
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


def first(completions: list, log_extra: Any, **_: Any) -> list[float]:
    log_extra("first word", [each.split()[0] if each else "" for each in completions])
    return [0.25] * len(completions)


def second(completions: list, **_: Any) -> list[float | None]:
    return [None, *[0.5] * (len(completions) - 1)]


def trained(folder: Any, funcs: Any = (first, second), **changes: Any) -> Any:
    settings = {"logging_steps": 2, "max_steps": 4, "log_completions": True}
    trainer = tiny.trainer(folder, reward_funcs=list(funcs), changes=settings | changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("count", [None, 2])
def test_the_completions_are_printed_where_metrics_are_logged(tmp_path, capsys, monkeypatch, count):
    monkeypatch.setenv("COLUMNS", "120")
    trainer = trained(tmp_path, num_completions_to_print=count)
    said = capsys.readouterr().out
    assert said.count("Step 2") == said.count("Step 4") == 1 and "Step 1" not in said and "Step 3" not in said
    head = next(line for line in said.splitlines() if "Prompt" in line)
    for title in ("Completion", "score", "first", "second", "first word"):
        assert title in head
    assert said.count("0.25") >= 2 * (count or 8) and "Advantage" not in head
    assert trainer.state.global_step == len(load_records(tmp_path)) == 4


def test_an_evaluation_prints_no_table_and_without_the_field_nothing_is_printed(tmp_path, capsys):
    trained(tmp_path, log_completions=False)
    assert "Step 2" not in capsys.readouterr().out
    callback = CompletionsCallback(None)
    callback.on_record(None, None, None, completions=[{"prompt": "a"}])
    callback.on_log(None, None, None, logs={"eval_score": 1.0})
    assert capsys.readouterr().out == ""


def test_escape_sequences_are_written_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    callback = CompletionsCallback(None)
    prompt = [{"role": "user", "content": "a\x1bc"}]
    row = {"prompt": prompt, "completion": "b\x9bd", "score": 1.0, "rewards": {}, "extra": "c\u202e"}
    callback.on_record(None, None, None, completions=[row])
    callback.on_log(SimpleNamespace(report_to=[]), SimpleNamespace(global_step=1), None, logs={"update": 1})
    said = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & {*said}
    assert all(text in said for text in ("a\\x1bc", "b\\x9bd", "c\\u202e"))


def test_printing_some_changes_no_random_numbers(tmp_path, capsys):
    random.seed(3)
    trained(tmp_path / "some", num_completions_to_print=2)
    some = random.random()
    random.seed(3)
    trained(tmp_path / "none", log_completions=False)
    assert some == random.random()
    assert (tmp_path / "some" / "completions.jsonl").read_text() == (
        tmp_path / "none" / "completions.jsonl"
    ).read_text()


class Tracker(SimpleNamespace):
    """What is used of Weights & Biases and of Trackio."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(logged=[], Table=lambda dataframe: dataframe, **attributes)

    def log(self, what: dict[str, Any]) -> None:
        self.logged.append(what["completions"])


@pytest.mark.parametrize("has_rich", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_trackers_get_all_completions_of_the_update(tmp_path, monkeypatch, capsys, has_rich, running):
    trained(tmp_path, max_steps=2, log_completions=False)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()][8:]
    monkeypatch.setattr(completions, "find_spec", lambda name: has_rich or None)
    trackers = {"wandb": Tracker(run=object() if running else None), "trackio": Tracker()}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    callback, args = CompletionsCallback(1), SimpleNamespace(report_to=["wandb", "trackio"])
    callback.on_record(args, None, None, completions=rows)
    for _ in range(2):  # the second log has nothing new
        callback.on_log(args, SimpleNamespace(global_step=2), None, logs={"update": 2})
    assert len(trackers["wandb"].logged) == running and len(trackers["trackio"].logged) == 1
    table = trackers["trackio"].logged[0]
    assert list(table) == ["step", "prompt", "completion", "score", "first", "second", "first word"]
    assert table["step"].tolist() == [2] * 8 and table["second"].isna().tolist() == [True] + [False] * 7
    assert ("Step 2" in capsys.readouterr().out) == has_rich
    callback.on_record(SimpleNamespace(report_to=[]), None, None, completions=rows)
    callback.on_log(SimpleNamespace(report_to=[]), SimpleNamespace(global_step=3), None, logs={"update": 3})
    assert len(trackers["trackio"].logged) == 1


def test_a_single_function_has_no_second_column_and_taken_names_get_numbers():
    row = {"update": 1, "prompt": "p", "completion": "c", "score": None, "ref_logp": None, "rewards": {"f": None}}
    single = as_columns([row | {"step": 7}, row | {"own": 1}])
    assert list(single.rewards) == ["score"] and single.extra == {"step_2": [7, None], "own": [None, 1]}
    several = as_columns([row | {"rewards": {"score": 1.0, "g": None}, "g": 2}])
    assert list(several.rewards) == ["score", "score_2", "g"] and several.extra == {"g_2": [2]}


def test_the_number_of_completions_is_an_error_without_the_field(tmp_path):
    with pytest.raises(ConfigError, match="`num_completions_to_print` got 3, but log_completions=False ignores it"):
        tiny.config(tmp_path, num_completions_to_print=3)
