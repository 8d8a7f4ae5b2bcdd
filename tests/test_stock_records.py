"""Records of TRL's own trainers: what they log in the words of a record, and a report that claims nothing of the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState
from trl import GRPOConfig, RLOOConfig, SFTConfig

from tests import tiny
from tests.test_adaptive import DUAL, TRAINERS, controlled, logged, stock_ppo, trainer_of
from tests.test_findings import rows_of, write_run
from trl_trustkl import AdaptiveKLCallback, BoundReportCallback, load_records
from trl_trustkl.cli import main
from trl_trustkl.report import read_run
from trl_trustkl.report.findings import find
from trl_trustkl.report.schema import Run
from trl_trustkl.report.summary import summarise
from trl_trustkl.report.tables import settings, updates
from trl_trustkl.trl_compat.trl_logs import episodes_seen, kind_of, record_of

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = pytest.mark.parametrize("kind", TRAINERS)


def recorded(trainer: Any) -> list[dict[str, Any]]:
    trainer.add_callback(BoundReportCallback())
    trainer.train()
    return load_records(trainer.args.output_dir)


def words_of(run: Run) -> dict[str, str]:
    return {statement.topic: statement.text for statement in summarise(run)}


# -- from a run to its records -----------------------------------------------------------------------------------------


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
    """The token mean times the mean length is the mean over responses, not an approximation of it."""
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
    assert rows[1]["length"] == rows[0]["length"] and [row["episode"] for row in rows] == [4, 8, 12, 16]
    assert (rows[1]["anchor"]["kl"] is None) == (kind == "rloo"), (
        "RLOO measures the KL of a generation, GRPO that of a step"
    )
    assert all(row["anchor"]["coef"] in logged(trainer, "kl/coef") for row in rows)
    assert rows[1]["trust"]["gated"] is not None


def test_without_an_anchor(tmp_path):
    rows = recorded(trainer_of("grpo", tmp_path, beta=0.0, max_steps=3, max_grad_norm=0.0))
    assert {row["anchor"]["coef"] for row in rows} == {0.0} and {row["anchor"]["kl"] for row in rows} == {None}
    assert {row["binding"] for row in rows} == {"none"}, "every mechanism that was on is known to have taken nothing"
    words = words_of(read_run(tmp_path))
    assert words["The anchor"] == "The KL to the reference is not on record; β was 0 throughout."


def test_stock_ppo(tmp_path):
    trainer = stock_ppo(tmp_path, learning_rate=0.5)
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


def test_other_trainers_write_nothing(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    assert record_of(args, TrainerState(), {"loss": 1.0}) is None
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    assert len(load_records(tmp_path)) == 3, "our own trainer's logs became records as well"


# -- single logs -------------------------------------------------------------------------------------------------------


def args_of(config: Any = GRPOConfig, **changes: Any) -> Any:
    common = {"output_dir": "none", "report_to": "none", "bf16": False, "use_cpu": True, "beta": 0.1}
    return config(**common | changes)


@pytest.mark.parametrize(
    ("changes", "rule", "low", "high"),
    [
        ({}, "ppo", 0.2, 0.2),
        ({"epsilon_high": 0.28, "loss_type": "dr_grpo"}, "ppo", 0.2, 0.28),
        ({"importance_sampling_level": "sequence"}, "gspo", 0.2, 0.2),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo", math.nan, 4.0),
        ({"loss_type": "sapo"}, "sapo", math.nan, math.nan),
    ],
)
def test_clip_rules_of_grpo(changes, rule, low, high):
    record = record_of(args_of(**changes), TrainerState(global_step=3), {"loss": 0.0, "grad_norm": 0.5})
    assert record.trust.rule == rule
    assert (record.trust.low, record.trust.high) == pytest.approx((low, high), nan_ok=True)
    assert math.isnan(record.trust.gated) and record.binding == "unknown"


@pytest.mark.parametrize(
    ("logs", "changes", "binding"),
    [
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 0.5}, {}, "unknown"),  # the anchor's share is not known
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 0.5}, {"beta": 0.0}, "none"),
        ({"clip_ratio/region_mean": 0.0, "grad_norm": 2.0}, {}, "grad_norm"),
        ({"clip_ratio/region_mean": 0.05, "grad_norm": 0.5}, {}, "clip"),
        ({"clip_ratio": 0.05, "grad_norm": 0.5}, {}, "clip"),  # as Liger's loss calls it
        ({"grad_norm": 0.5}, {"beta": 0.0}, "unknown"),
        ({"clip_ratio/region_mean": None, "grad_norm": 0.5}, {"beta": 0.0}, "unknown"),
    ],
)
def test_binding_from_what_is_known(logs, changes, binding):
    assert record_of(args_of(**changes), TrainerState(global_step=1), {"loss": 0.0} | logs).binding == binding


def test_the_gradient_of_grpos_anchor():
    logs, state = {"loss": 0.0}, TrainerState(global_step=1)
    assert record_of(args_of(use_bias_correction_kl=True), state, logs).anchor.gradient == "partial"
    assert record_of(args_of(use_bias_correction_kl=False), state, logs).anchor.gradient == "biased"


def test_kinds_and_episodes():
    args = args_of(
        RLOOConfig, per_device_train_batch_size=8, gradient_accumulation_steps=3, num_iterations=2, num_generations=2
    )
    assert kind_of(args) == "rloo" and kind_of(args_of()) == "grpo" and kind_of(object()) is None
    assert [episodes_seen(args, step) for step in (0, 1, 2)] == [0, 12, 24]
    assert kind_of(tiny.config("none")) is None


# -- the report of such a run ------------------------------------------------------------------------------------------


@KINDS
def test_its_report(kind, tmp_path, capsys):
    recorded(controlled(kind, tmp_path, max_steps=6))
    assert main(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    page = next(tmp_path.rglob("*.html")).read_text("utf-8")
    assert "nan" not in page.lower().split("<img")[0] and "No update was measured." in page
    run = read_run(tmp_path)
    assert run.notes == []
    words = words_of(run)
    assert "The anchor is not among them: its share is not on record." in words["What bound the updates"]
    assert f"(an estimate, by {'k3' if kind == 'grpo' else 'k1'})" in words["The anchor"]
    assert words["Guaranteed"].endswith("Nor was any update measured.")
    assert not any("nan" in cell for table in (settings(run), updates(run)) for row in table.rows for cell in row)


def stock_rows(count: int = 12, **changes: Any) -> list[dict[str, Any]]:
    unknown = {
        "anchor__kl_exact": None, "anchor__kl_stderr": None, "anchor__share": None, "anchor__estimator": "k3",
        "anchor__placement": "loss", "anchor__gradient": "partial", "trust__kl": None, "trust__kl_max": None,
        "trust__kl_proposed": None, "trust__tv": None, "trust__max_ratio": None, "trust__ratio_quantiles": {},
        "value__clip": None, "value__gated": None, "value__explained_variance": None, "sampler__kl": None,
        "trust__epochs": 1.0, "binding": "unknown",
    }  # fmt: skip
    return rows_of(count, **unknown | changes)


def stock_run(folder: Path, **changes: Any) -> Run:
    return read_run(write_run(folder / "run", stock_rows(**changes)))


def test_what_is_unknown_is_no_finding(tmp_path):
    unknown = {"trust__gated": None, "anchor__kl": None, "anchor__coef": 0.0, "gradient__scale": None, "entropy": None}
    run = stock_run(tmp_path, **unknown, lr=lambda p: 1e-3 if p < 0.5 else 1e-6)
    assert find(run) == []
    words = words_of(run)
    assert words["What bound the updates"] == (
        "Of 12 updates, the mechanism that took the largest share was not on record in 12."
    )
    assert words["The anchor"] == "The KL to the reference is not on record; β was 0 throughout."
    assert "nothing" not in words["What bound the updates"] and "–" not in " ".join(words.values())


def test_one_update_without_a_clip_ratio_is_enough_to_say_nothing_of_all(tmp_path):
    idle = {"trust__gated": lambda p: None if p == 1 else 0.0, "anchor__gradient": "exact"}
    assert "clip_never_binds" not in {finding.name for finding in find(stock_run(tmp_path, **idle))}


@pytest.mark.parametrize(
    ("name", "changes", "advice"),
    [
        ("clip_never_binds", {"trust__gated": 0.0}, "num_iterations=2"),
        ("target_never_reached", {"anchor__kl": lambda p: 3 * p}, "max_steps=24"),
        ("target_never_reached", {"anchor__kl": 20.0}, "the controller's coef=0.1"),
        ("coefficient_pinned", {"anchor__kl": 20.0}, "Give the controller max_coef=0.5"),
        ("negative_estimate", {"anchor__kl": -1.0}, "gradient_accumulation_steps"),
        ("biased_estimator", {}, "RLOOTrainer"),
        ("biased_estimator", {"anchor__gradient": "biased"}, "use_bias_correction_kl=True"),
        ("biased_estimator", {"anchor__gradient": "biased", "anchor__placement": "reward"}, 'kl_estimator="k1"'),
    ],
)
def test_findings_in_terms_of_the_trainer(name, changes, advice, tmp_path):
    found = {finding.name: finding for finding in find(stock_run(tmp_path, **changes))}
    assert advice in found[name].advice
    for finding in found.values():
        assert "–" not in finding.evidence, "a number that is not there, in a sentence that needs it"
        assert not any(option in finding.advice for option in ("trust_", "kl_coef", "kl_controller", "kl_placement"))


def test_an_anchor_that_is_unknown_is_not_called_off(tmp_path):
    run = stock_run(tmp_path, anchor__coef=None)
    assert "β was 0" not in words_of(run)["The anchor"]
    assert json.loads((tmp_path / "run" / "bounds.jsonl").read_text().splitlines()[0])["anchor"]["coef"] is None
