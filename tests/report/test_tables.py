"""The tables of a report: settings, updates, completions, and several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.example_runs import SAMPLE_KEYS, rows_of, run_folder, write_run
from tests.pages import Page
from trl_trustkl.report import read_run, render_report
from trl_trustkl.report.findings import find
from trl_trustkl.report.schema import Run
from trl_trustkl.report.tables import ROWS, SHOWN, UPDATE_COLUMNS, comparison, moments, recurring, settings, updates


def test_completions_at_start_middle_and_end(tmp_path: Path) -> None:
    shown = moments(read_run(run_folder(tmp_path, 12)))
    assert [(moment.when, moment.update) for moment in shown] == [("start", 1), ("middle", 7), ("end", 12)]
    two = moments(read_run(run_folder(tmp_path, 2)))
    assert [(moment.when, moment.update) for moment in two] == [("start", 1), ("end", 2)]
    assert [moment.when for moment in moments(read_run(run_folder(tmp_path, 1)))] == ["start"]


def shown_of(folder: Path, prompts: dict[int, str]) -> dict[str, list[tuple[str, int, str]]]:
    """What is shown of each prompt that recurs, where `prompts` has those of each update, one letter each."""
    rows = [
        {**SAMPLE_KEYS, "update": update, "prompt": prompt, "completion": f"{prompt}{update}{which}"}
        for update, letters in prompts.items()
        for prompt in letters
        for which in ("first", "second")
    ]
    found = recurring(read_run(write_run(folder, rows_of(9), rows)))
    return {
        of[0].samples[0].prompt: [(each.when, each.update, each.samples[0].completion) for each in of] for of in found
    }


def test_a_prompt_that_recurs_is_shown_at_the_start_in_the_middle_and_at_the_end(tmp_path: Path) -> None:
    prompts = {1: "ab", 2: "ce", 3: "d", 4: "ea", 5: "e", 6: "ad", 7: "", 8: "bda", 9: "e"}
    shown = shown_of(tmp_path, prompts)
    assert shown == {
        "a": [("start", 1, "a1first"), ("middle", 4, "a4first"), ("end", 8, "a8first")],
        "e": [("start", 2, "e2first"), ("middle", 5, "e5first"), ("end", 9, "e9first")],
        "b": [("start", 1, "b1first"), ("end", 8, "b8first")],
    }


def test_prompts_of_one_update_or_of_one_part_of_a_run_do_not_recur(tmp_path: Path) -> None:
    assert shown_of(tmp_path, {1: "aa"}) == {}
    assert shown_of(tmp_path, {1: "ab", 2: "ab", 3: "c", 4: "c", 5: "d", 6: "d"}) == {}
    assert len(shown_of(tmp_path, {1: "abcdefg", 9: "abcdefg"})) == SHOWN


def test_a_long_completion_is_cut_and_its_length_stated(tmp_path: Path) -> None:
    rows = [{**SAMPLE_KEYS, "completion": "<b>" * 4_000_000}]
    page = render_report(write_run(tmp_path, rows_of(1), rows))
    assert page.stat().st_size < 2_000_000
    assert "(11,998,800 more characters)" in Page(page.read_text("utf-8")).text


def values_of(run: Run) -> dict[str, str]:
    return {setting: value for _, setting, value in settings(run).rows}


def test_a_setting_has_its_value_or_what_it_changed_from_and_to(run_of) -> None:
    changes = {"trust__limit": None, "anchor__coef": lambda p: 0.5 if p == 0.5 else p / 10, "lr": 0.001}
    found = values_of(run_of(4, **changes, anchor__estimator="k3"))
    assert found["kl_estimator, kl_placement"] == "k3 in the reward; its gradient is exact"
    assert found["β (kl_coef)"] == "0.025 → 0.1 (between 0.025 and 0.5)"
    assert found["kl_target"] == "6 nats per response" and found["trust_max_kl"] == "off"
    assert found["cliprange"] == "ratio in [0.8, 1.2]" and found["learning rate"] == "0.001"
    assert found["episodes per update"] == "16" and found["max_grad_norm"] == "1"


def test_a_run_without_a_value_has_its_estimator_in_its_place(run_of) -> None:
    record = {"estimator": "rloo", "num_generations": 8, "groups": 2, "groups_without_signal": 0}
    value = {"value__clip": None, "value__gated": None, "value__explained_variance": None}
    run = run_of(12, **value, advantage=record)
    assert run.records[0].advantage.num_generations == 8
    found = values_of(run)
    assert found["advantage_estimator, num_generations"] == "rloo, 8 responses to each prompt"
    assert "cliprange_value" not in found and "cliprange_value" in values_of(run_of(12))
    assert not any("value" in finding.name for finding in find(run))
    assert any("value" in finding.name for finding in find(run_of(12, value__explained_variance=0.0)))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("none", "off"),
        ("gspo", "a response's mean ratio from 1 - 0.2 to 1 + 0.2"),
        ("sapo", "none: the rule has no range"),
        ("spo", "ratio in [0.8, 1.2]"),
    ],
)
def test_the_range_of_a_clip_rule_in_words(run_of, rule, said) -> None:
    assert values_of(run_of(2, trust__rule=rule))["cliprange"] == said


LEFT_OUT = ("limit", "scale", "sampler KL", "truncated")
"""The columns of which a run without a limit and without an importance correction has nothing on record."""


def test_a_run_that_is_corrected_has_the_sampler_in_its_rows(run_of) -> None:
    head, rows = updates(run_of(3, sampler__kl=0.002, sampler__truncated=lambda p: 0.25 if p == 1 else None))
    row = dict(zip(head, rows[2], strict=True))
    assert (row["sampler KL"], row["truncated"]) == ("0.002", "25 %")
    assert rows[0][head.index("sampler KL")] == rows[0][head.index("truncated")] == "–"


def test_a_long_run_has_a_row_for_every_so_many_updates(run_of) -> None:
    head, rows = updates(run_of(3, refused=lambda p: "too far" if p == 1 else None))
    assert head == [name for name in UPDATE_COLUMNS if name not in LEFT_OUT] and [row[0] for row in rows] == [
        "1",
        "2",
        "3",
    ]
    row = dict(zip(head, rows[0], strict=True))
    assert (row["KL to ref"], row["gated"], row["bound by"]) == ("6", "10 %", "clip")
    assert rows[2][-1] == "rejected: too far"
    long = [int(row[0].replace(",", "")) for row in updates(run_of(3 * ROWS)).rows]
    assert len(long) == ROWS and long[0] == 1 and long[-1] == 3 * ROWS and long == sorted(set(long))


def test_runs_stand_side_by_side(tmp_path) -> None:
    first = read_run(run_folder(tmp_path / "one", 3, trust__limit=0.02, trust__kl_proposed=lambda p: 0.03 * p))
    second = read_run(
        run_folder(tmp_path / "two", 6, score=lambda p: p, binding=lambda p: "anchor" if p > 0.3 else "none")
    )
    head, rows = comparison([first, second])
    found = {title: cells for title, *cells in rows}
    assert head == ["", "one", "two"] and found["updates"] == ["3", "6"]
    assert found["score, last third"] == ["0.4", "0.917"] and found["limited most often by"] == ["clip", "anchor"]
    assert found["updates over the limit, as proposed"] == ["33 %", "no limit"] and found["rejected updates"] == [
        "0",
        "0",
    ]
