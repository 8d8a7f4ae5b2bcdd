"""Runs of TRL's trainers: the records of their logs, and a report that claims only what the records show."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trl_trainers import DUAL, KINDS, controlled, logged, trainer_of, trl_ppo
from trl_trustkl import AdaptiveKLCallback, BoundReportCallback, load_records
from trl_trustkl.cli import main
from trl_trustkl.report import read_run
from trl_trustkl.report.schema import Run
from trl_trustkl.report.summary import summarise
from trl_trustkl.report.tables import settings, updates

pytestmark = pytest.mark.filterwarnings("ignore")


def recorded(trainer: Any) -> list[dict[str, Any]]:
    trainer.add_callback(BoundReportCallback())
    trainer.train()
    return load_records(trainer.args.output_dir)


def words_of(run: Run) -> dict[str, str]:
    return {statement.topic: statement.text for statement in summarise(run)}


@KINDS
def test_a_record_for_every_log_of_training(kind, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.5}
    trainer = controlled(kind, tmp_path, **settings)
    rows = recorded(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["episode"] == 40
    for row, log in zip(rows, logs, strict=True):
        length = log["completions/mean_length"]
        anchor, trust = row["anchor"], row["trust"]
        assert row["score"] == log["reward"] and row["length"] == length and row["entropy"] == log["entropy"]
        assert row["eos_rate"] == 1 - log["completions/clipped_ratio"] and row["lr"] == log["learning_rate"]
        assert anchor["kl"] == pytest.approx(log["kl"] * length) and anchor["coef"] == log["kl/coef"]
        assert anchor["target"] == pytest.approx(DUAL.target * length)
        assert trust["gated"] == log["clip_ratio/region_mean"] and (trust["low"], trust["high"]) == (0.2, 0.2)
        norm = row["gradient"]["norm"]
        assert norm == log["grad_norm"] and row["gradient"]["scale"] == pytest.approx(min(1, 0.5 / norm), rel=1e-5)
        assert row["seconds"] == {"total": log["step_time"]}
        for unknown in (anchor["kl_exact"], anchor["share"], trust["kl"], trust["max_ratio"], trust["guaranteed"]):
            assert unknown is None
    expected = {"grpo": ("k3", "loss", "partial"), "rloo": ("k1", "reward", "exact")}[kind]
    assert tuple(rows[0]["anchor"][key] for key in ("estimator", "placement", "gradient")) == expected


def test_rloo_kl_per_response_is_that_of_the_responses(tmp_path):
    """The mean over tokens times the mean length equals the mean over responses."""
    trainer = controlled("rloo", tmp_path, max_steps=3)
    sums: list[float] = []
    generate = trainer._generate_and_score_completions

    def keep(inputs: Any) -> Any:
        output = generate(inputs)
        sums.append(output["completion_mask"].sum(-1).float().mean().item() * trainer._metrics["train"]["kl"][-1])
        return output

    trainer._generate_and_score_completions = keep
    assert [row["anchor"]["kl"] for row in recorded(trainer)] == pytest.approx(sums, rel=1e-5, abs=1e-9)


@KINDS
def test_steps_that_reuse_a_generation_are_recorded_too(kind, tmp_path):
    trainer = controlled(kind, tmp_path, num_iterations=2, max_steps=4)
    rows = recorded(trainer)
    assert [row["score"] is None for row in rows] == [False, True, False, True]
    assert rows[1]["length"] == rows[0]["length"] and [row["episode"] for row in rows] == [8, 8, 16, 16]
    assert (rows[1]["anchor"]["kl"] is None) == (kind == "rloo"), (
        "RLOO measures the KL of a generation, GRPO that of a step"
    )
    assert all(row["anchor"]["coef"] in logged(trainer, "kl/coef") for row in rows)
    assert rows[1]["trust"]["gated"] is not None


@KINDS
@pytest.mark.parametrize(
    ("settings", "updates"),
    [({"logging_steps": 2}, [2, 4, 5]), ({"logging_steps": 5}, [5]), ({"logging_strategy": "no"}, [5])],
)
def test_the_last_steps_are_recorded_whatever_the_logging_steps(kind, settings, updates, tmp_path):
    """Their record has the mean of their metrics, as that of a run which logs each step."""
    each = recorded(trainer_of(kind, tmp_path / "each", max_steps=5, learning_rate=0.0))
    rows = recorded(trainer_of(kind, tmp_path / "some", max_steps=5, learning_rate=0.0, **settings))
    assert [row["update"] for row in rows] == updates and rows[-1]["episode"] == each[-1]["episode"]
    last = each[(updates[-2] if len(updates) > 1 else 0) :]
    for key in ("score", "length"):
        assert rows[-1][key] == pytest.approx(sum(row[key] for row in last) / len(last))


def test_without_an_anchor(tmp_path):
    rows = recorded(trainer_of("grpo", tmp_path, beta=0.0, max_steps=3, max_grad_norm=0.0))
    assert {row["anchor"]["coef"] for row in rows} == {0.0} and {row["anchor"]["kl"] for row in rows} == {None}
    assert {row["binding"] for row in rows} == {"none"}, "a mechanism bound an update although none took a share"
    words = words_of(read_run(tmp_path))
    assert words["The anchor"] == "The KL to the reference is not on record; β was 0 throughout."


def test_stock_ppo(tmp_path):
    trainer = trl_ppo(tmp_path, learning_rate=0.5)
    trainer.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer))
    rows = recorded(trainer)
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert [row["update"] for row in rows] == [1, 2, 3, 4] and [row["episode"] for row in rows] == [10, 20, 30, 40]
    for row, log in zip(rows, logs, strict=True):
        assert row["anchor"]["kl"] == log["objective/kl"] and row["anchor"]["target"] == DUAL.target
        assert row["anchor"]["coef"] == log["kl/coef"] and row["score"] == log["objective/scores"]
        assert row["trust"]["gated"] == log["policy/clipfrac_avg"] and row["value"]["gated"] == log["val/clipfrac_avg"]
        assert row["gradient"] == {"norm": None, "max_norm": None, "scale": 1.0}
        assert row["binding"] == ("clip" if log["policy/clipfrac_avg"] >= 0.01 else "unknown")
        assert row["length"] is None and row["eos_rate"] is None and row["value"]["explained_variance"] is None
    assert read_run(trainer.args.output_dir).records


@KINDS
def test_the_report_of_a_run(kind, tmp_path, capsys):
    recorded(controlled(kind, tmp_path, max_steps=6))
    assert main(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    page = next(tmp_path.rglob("*.html")).read_text("utf-8")
    assert "nan" not in page.lower().split("<img")[0] and "No update was measured." in page
    run = read_run(tmp_path)
    assert run.notes == []
    words = words_of(run)
    assert "The anchor is not among them: its share is not on record." in words["What limited the updates"]
    assert f"(an estimate, by {'k3' if kind == 'grpo' else 'k1'})" in words["The anchor"]
    assert words["Guaranteed"].endswith("Nor was any update measured.")
    assert not any("nan" in cell for table in (settings(run), updates(run)) for row in table.rows for cell in row)
