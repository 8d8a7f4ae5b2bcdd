"""The life of a run with a TrustRegionCallback: saved in the middle of a window, ended there, evaluated there, resumed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trl_trainers import KINDS, logged, trainer_of
from tests.watched import without_seconds
from tests.weights import same, trained_weights
from tests.windows import LIMIT, ROUNDING, kls, limited, records_of, saved
from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records

pytestmark = pytest.mark.filterwarnings("ignore")
WINDOWS = {"num_iterations": 3, "max_steps": 6}
"""Two windows of three steps."""


class Asks(TrainerCallback):
    """Sets a flag of the control in an event of some steps."""

    def __init__(self, flag: str, event: str, steps: tuple[int, ...]) -> None:
        def ask(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in steps:
                setattr(control, flag, True)

        setattr(self, event, ask)


def asks(flag: str, event: str, *steps: int) -> Any:
    return lambda: Asks(flag, event, steps)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVES: dict[str, tuple[dict[str, Any], Any]] = {
    "at each step": ({"save_strategy": "steps", "save_steps": 1}, None),
    "by another callback": ({}, asks("should_save", "on_step_end", 1, 2, 5)),
    "by another callback after a log": ({}, asks("should_save", "on_log", 1, 2, 5)),
    "by another callback after an evaluation": (EVALUATED, asks("should_save", "on_evaluate", 1, 2, 5)),
    "at the best": ({**EVALUATED, "save_strategy": "best", "metric_for_best_model": "loss"}, None),
}


def saved_kls(trainer: Any) -> dict[int, float]:
    """The mean KL(π_old‖π) on its window's batch of each model that was saved, by its step."""
    found = {}
    for folder in trainer.args_folder.glob("checkpoint-*"):
        step = int(folder.name.rpartition("-")[2])
        batch = next(each for each in reversed(trainer.witness.batches) if each.first <= step)
        found[step] = float(kls(batch.rollout, batch.old, saved(folder)).mean())
    return found


def run_with(tmp_path: Any, settings: dict[str, Any], other: Any, **limits: Any) -> Any:
    """A run with another callback, which is added after the TrustRegionCallback."""
    trainer = limited("grpo", tmp_path, witness=True, **WINDOWS | settings, **limits)
    trainer.args_folder = tmp_path
    if other is not None:
        trainer.add_callback(other())
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", SAVES)
def test_a_model_that_is_saved_in_the_middle_of_a_window_is_within_the_limit(case, tmp_path):
    trainer = run_with(tmp_path, *SAVES[case], max_kl=LIMIT)
    found = saved_kls(trainer)
    assert any(step % 3 for step in found), "nothing was saved in the middle of a window"
    assert max(found.values()) <= LIMIT + ROUNDING, found
    assert max(found.values()) > 0.3 * LIMIT
    assert [row["update"] for row in load_records(tmp_path)] == [3, 6]
    assert not any(type(each).__name__ == "BeforeSave" for each in trainer.callback_handler.callbacks)


def test_without_a_limit_such_a_model_is_beyond_it(tmp_path):
    found = saved_kls(run_with(tmp_path, *SAVES["at each step"]))
    assert sum(kl > LIMIT for step, kl in found.items() if step % 3) >= 3, found


def test_the_window_goes_on_from_what_was_saved(tmp_path):
    """The limit holds between π_old, not the policy that was saved, and the end of the window."""
    trainer = run_with(tmp_path, *SAVES["at each step"], max_kl=LIMIT)
    witness = trainer.witness
    for step in (1, 2, 4, 5):
        assert not same(saved(tmp_path / f"checkpoint-{step}"), witness.proposed[step]), "the next step made no change"
    kept = [saved(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    assert same(kept[5], trained_weights(trainer.model)) and same(kept[2], witness.batches[1].old)
    for row, batch, step in zip(load_records(tmp_path), witness.batches, (3, 6), strict=True):
        assert row["trust"]["kl"] == pytest.approx(
            float(kls(batch.rollout, batch.old, kept[step - 1]).mean()), rel=1e-3
        )


# -- the end of a run in the middle of a window ------------------------------------------------------------------------

ENDS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "by max_steps": ({"max_steps": 5}, None, 5),
    "by max_steps, and not logged": ({"max_steps": 5, "logging_steps": 100}, None, 5),
    "by another callback": ({}, asks("should_training_stop", "on_step_end", 4), 4),
    "by another callback after a log": ({}, asks("should_training_stop", "on_log", 4), 4),
    "by another callback after an evaluation": (EVALUATED, asks("should_training_stop", "on_evaluate", 4), 4),
    "by another callback between two passes": ({}, asks("should_training_stop", "on_substep_end", 4), 4),
    "with a save": ({"max_steps": 5, "save_strategy": "steps", "save_steps": 5}, None, 5),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_run_that_ends_in_the_middle_of_a_window_is_within_the_limit_and_has_its_record(case, tmp_path):
    settings, other, last = ENDS[case]
    trainer = run_with(tmp_path, settings, other, max_kl=LIMIT)
    assert trainer.state.global_step == last
    batch = trainer.witness.batches[1]
    kl = float(kls(batch.rollout, batch.old, trained_weights(trainer.model)).mean())
    assert 0.3 * LIMIT < kl <= LIMIT + ROUNDING
    rows = load_records(tmp_path)
    assert [row["update"] for row in rows] == [3, last]
    assert rows[1]["trust"]["kl"] == pytest.approx(kl, rel=1e-3) and rows[1]["trust"]["guaranteed"] == LIMIT
    assert [row["trust"]["epochs"] for row in rows] == [3.0, last - 3.0]
    if "save" in case:
        assert same(saved(tmp_path / "checkpoint-5"), trained_weights(trainer.model))
    if "log" not in case and "evaluation" not in case:  # after these, TRL logs no more
        assert logged(trainer, "trust/kl")[-1] == rows[-1]["trust"]["kl"]


# -- evaluation and resuming -------------------------------------------------------------------------------------------


def evaluated_apart(trainer: Any) -> None:
    """Let its evaluations take their random numbers from elsewhere: generation would take those of the next batch."""
    evaluate = trainer.evaluate

    def apart(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            return evaluate(*args, **kwargs)

    trainer.evaluate = apart


@KINDS
def test_evaluations_in_the_middle_of_a_window_change_nothing_and_make_no_record(kind, tmp_path):
    limits = {"max_kl": LIMIT, "lr_target": LIMIT / 4, "stop": LIMIT * 2}
    runs = []
    for name, settings in (("without", {}), ("with", {**EVALUATED, "eval_on_start": True})):
        trainer = limited(kind, tmp_path / name, **WINDOWS, **settings, **limits)
        evaluated_apart(trainer)
        runs.append((without_seconds(records_of(trainer)), trained_weights(trainer.model)))
        assert len(logged(trainer, "eval_loss")) == (7 if settings else 0)
    (rows, weights), (others, other_weights) = runs
    assert [row["update"] for row in rows] == [3, 6] and rows == others
    assert same(weights, other_weights)


SETTINGS = {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
LIMITS = {"max_kl": LIMIT, "lr_target": LIMIT / 2}


@KINDS
@pytest.mark.parametrize("restored_by_transformers", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, restored_by_transformers, tmp_path):
    settings = SETTINGS | {"restore_callback_states_from_checkpoint": restored_by_transformers}
    complete = limited(kind, tmp_path / "run", **settings, **LIMITS)
    rows = records_of(complete)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    resumed = limited(kind, tmp_path / "resumed", **settings, **LIMITS)
    checkpoint = tmp_path / "resumed" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [row["update"] for row in rows] == [2, 4, 6]
    assert without_seconds(load_records(tmp_path / "resumed")) == without_seconds(rows)
    assert same(trained_weights(resumed.model), trained_weights(complete.model))
    completions = [(tmp_path / name / "completions.jsonl").read_text() for name in ("run", "resumed")]
    assert completions[0] == completions[1]
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["TrustRegionState"]
    factor = kept["attributes"]["lr_factor"]
    assert factor != 1.0 and rows[2]["lr"] == pytest.approx(2e-2 * factor), "the factor had no effect"


def test_a_checkpoint_of_a_run_without_the_callback_can_be_resumed_with_it(tmp_path):
    trainer_of("grpo", tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = limited("grpo", tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **LIMITS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["update"] for row in load_records(tmp_path)] == [3, 4]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrustRegionState"]["attributes"]["lr_factor"] != 1.0


def test_a_run_that_is_resumed_in_the_middle_of_a_window_generates_anew(tmp_path):
    """TRL does so; the limit then holds from the policy that was saved."""
    settings = WINDOWS | {"save_strategy": "steps", "save_steps": 2}
    limited("grpo", tmp_path, max_kl=LIMIT, **settings).train()
    trainer = limited("grpo", tmp_path, max_kl=LIMIT, witness=True, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows, (batch, last) = load_records(tmp_path), trainer.witness.batches
    assert [row["update"] for row in rows] == [5, 6] and (batch.first, last.first) == (3, 6)
    assert same(batch.old, saved(tmp_path / "checkpoint-2"))
    assert float(kls(batch.rollout, batch.old, last.old).mean()) <= LIMIT + ROUNDING


def test_a_second_call_of_train_begins_with_a_new_window(tmp_path):
    trainer = limited("grpo", tmp_path, witness=True, max_steps=3, **LIMITS)
    first = records_of(trainer)
    second = records_of(trainer)
    assert [row["update"] for row in second] == [row["update"] for row in first] == [1, 2, 3]
    assert second[0]["lr"] != 2e-2
    for batch, kept in zip(trainer.witness.batches, [each.old for each in trainer.witness.batches[1:]], strict=False):
        assert float(kls(batch.rollout, batch.old, kept).mean()) <= LIMIT + ROUNDING


def test_a_callback_that_was_replaced_leaves_no_state_behind(tmp_path):
    """As when a cell of a notebook runs again."""
    trainer = trainer_of("grpo", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    TrustRegionCallback(trainer, **LIMITS)  # never added
    for _ in range(2):
        trainer.remove_callback(TrustRegionCallback)
        trainer.add_callback(TrustRegionCallback(trainer, **LIMITS))
    trainer.add_callback(BoundReportCallback(report=False))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrustRegionState"]["attributes"]["lr_factor"] != 1.0
    assert len(load_records(tmp_path)) == 2
