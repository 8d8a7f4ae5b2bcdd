"""The report of a run of TRL's GRPO or RLOO with a TrustRegionCallback: nothing empty, in the trainer's units and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.example_runs import rows_of, write_run
from trl_trustkl.report import read_run, render_report
from trl_trustkl.report.figures import draw
from trl_trustkl.report.findings import find
from trl_trustkl.report.schema import Run
from trl_trustkl.report.summary import summarise
from trl_trustkl.report.tables import comparison, settings, updates

GROUP = {
    "trainer": "GRPOTrainer", "binding": "unknown", "anchor__estimator": "k3", "anchor__placement": "loss",
    "anchor__gradient": "partial", "anchor__share": None, "anchor__target": None, "anchor__kl_per_token": 0.3,
    "trust__gated": 0.0, "trust__gated_low": 0.0, "trust__gated_high": 0.0, "trust__epochs": 1.0, "sampler__kl": None,
    "value__clip": None, "value__gated": None, "value__explained_variance": None, "gradient__norm": None,
    "gradient__scale": None, "anchor__coef": 0.0, "anchor__kl_exact": lambda p: 6.0 * p, "shares": {"clip": 0.0, "lr": 0.0},
}  # fmt: skip
"""TRL's defaults: one step for each batch, and β = 0. The mean length is 20 tokens."""
CONTROLLED = {"anchor__coef": 0.04, "anchor__target_per_token": 0.2, "anchor__target": 4.0}
LIMITED = {
    "trust__limit": 0.02, "trust__guaranteed": 0.02, "trust__scale": 0.5, "trust__tries": 2, "trust__kl_proposed": 0.08,
    "binding": "backtrack", "shares": {"clip": 0.0, "backtrack": 0.5},
}  # fmt: skip


def run_of(folder: Path, count: int = 12, **changes: Any) -> Run:
    sample = {"update": 1, "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": None}
    return read_run(write_run(folder / "run", rows_of(count, **GROUP | changes), [sample]))


@pytest.mark.parametrize("changes", [{}, CONTROLLED, LIMITED, CONTROLLED | LIMITED])
def test_nothing_is_empty(tmp_path, changes):
    run = run_of(tmp_path, **changes)
    head, rows = updates(run)
    for index, title in enumerate(head):
        assert any(row[index] != "–" for row in rows), title
    names = {figure.name for figure in draw(run.records)}
    assert names == {
        "score",
        "frontier",
        "anchor",
        "trust_region",
        "ratios",
        *(["gated"] if "trust__limit" in changes else []),
    }
    page = render_report(run.folder).read_text()
    text = page.partition("</details>")[2]  # without the glossary
    assert "nan" not in text.lower().replace("finance", "") and "reference <b>" not in text
    assert not any(name in text for name in ("kl_coef", "num_ppo_epochs", "cliprange", "kl_estimator=", "trust_coef"))
    assert not any(
        row[2] in ("off", "–") for row in settings(run).rows if row[1] not in ("kl_target", "trust_max_kl", "beta")
    )


def test_a_target_is_in_the_unit_in_which_it_was_given(tmp_path):
    run = run_of(tmp_path, **CONTROLLED)
    said = dict(summarise(run))["The anchor"]
    assert "averaged 0.263 nats per token" in said and "its target of 0.2" in said
    assert ["anchor", "kl_target", "0.2 nats per token"] in settings(run).rows
    assert "0.2 per token" in next(row for row in comparison([run]).rows if row[0] == "KL target")
    svg = next(figure.svg for figure in draw(run.records) if figure.name == "anchor")
    assert svg.count("<!-- KL to the reference") == 0 or "nats per token" in svg
    above = {each.name: each for each in find(run_of(tmp_path / "above", **CONTROLLED | {"anchor__kl_exact": 12.0}))}
    assert "The target was 0.2 nats per token; the KL was at least 0.6" in above["target_never_reached"].evidence
    assert above["target_never_reached"].advice == "Set beta=0.08, twice the last β."


def test_the_clip_that_cannot_act_is_explained(tmp_path):
    found = {each.name: each for each in find(run_of(tmp_path))}
    assert found["clip_never_binds"].title == "epsilon has no effect: the ratio is 1 by construction"
    assert found["clip_never_binds"].advice == (
        "Set trust_max_kl=0.005 (with TrustRegionCallback max_kl=0.005), in nats per token, which limits each step; or set "
        "num_iterations=2."
    )
    assert "ratio_far_outside" not in found
    unmeasured = find(run_of(tmp_path / "unmeasured", trust__kl=None, trust__max_ratio=None))
    assert "trust_max_kl=0.02 " in next(each.advice for each in unmeasured if each.name == "clip_never_binds")


def test_a_limit_that_decides_every_update_is_harmless(tmp_path):
    found = {each.name: each for each in find(run_of(tmp_path, **LIMITED))}
    assert set(found) == {"limit_decides"}
    assert "This is harmless" in found["limit_decides"].evidence
    assert "trust_lr_target=0.01 (with TrustRegionCallback lr_target=0.01)" in found["limit_decides"].advice


def test_several_batches_of_one_step_are_all_kept(tmp_path):
    """With steps_per_generation=1, an optimizer step uses several generation batches, each with a record."""
    rows = rows_of(6, **GROUP)
    for number, row in enumerate(rows):
        row["update"] = 1 + number // 2
    run = read_run(write_run(tmp_path, rows))
    assert [record.update for record in run.records] == [1, 1, 2, 2, 3, 3] and run.notes == []
    assert len(updates(run).rows) == 6 and len(draw(run.records)) == 5
    rows.reverse()
    run = read_run(write_run(tmp_path, rows))
    assert [record.update for record in run.records] == [1, 1, 2, 2, 3, 3] and "not in order" in run.notes[0]


def test_clips_that_act_are_judged_as_with_ppo(tmp_path):
    acts = {"trust__gated": 0.1, "trust__epochs": 2.0, "trust__max_ratio": 300.0}
    found = {each.name: each for each in find(run_of(tmp_path, **acts))}
    assert "clip_never_binds" not in found and "max_kl=0.005" in found["ratio_far_outside"].advice


def test_what_is_not_on_record_is_said(tmp_path):
    said = dict(summarise(run_of(tmp_path)))
    assert "none of those on record (every share was below 1 %) in 12 of 12 updates" in said["What limited the updates"]
    assert np.isfinite(run_of(tmp_path / "b").records[0].trust.kl)
