"""The metrics of a run, against a second implementation and by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from tests.example_runs import SAMPLE_KEYS, rows_of, write_run
from trl_trustkl.compare import metrics
from trl_trustkl.compare.metrics import METRICS, of_run, result, spread
from trl_trustkl.report import read_run


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


def test_which_mechanisms_were_enabled_is_read_from_the_records(tmp_path: Path) -> None:
    off = read_run(write_run(tmp_path / "off", rows_of(2, anchor__coef=0.0, trust__rule="none")))
    on = read_run(write_run(tmp_path / "on", rows_of(2)))
    rule = read_run(write_run(tmp_path / "rule", rows_of(2, trust__rule="spo")))
    found = [result("x", {}, {1: run}, last=1) for run in (off, on, rule)]
    assert [(each.anchored, each.clipped, each.clip_end) for each in found] == [
        (False, False, None), (True, True, 1.2), (True, True, None),
    ]  # fmt: skip


def test_a_clip_that_cannot_act_counts_as_none(tmp_path: Path) -> None:
    """That of GRPO and RLOO with one optimizer step for each batch."""
    runs = {}
    for seed, changes in enumerate(
        ({"trust__gated": 0.0}, {"trust__gated": 0.1}, {"trust__gated": 0.0, "trainer": None})
    ):
        rows = rows_of(3, **{"trainer": "GRPOTrainer", **changes})
        runs[seed] = read_run(write_run(tmp_path / str(seed), rows))
    found = [result("a", {}, {seed: run}, last=1) for seed, run in runs.items()]
    assert [(each.clipped, each.clip_end) for each in found] == [(False, None), (True, 1.2), (True, 1.2)]
