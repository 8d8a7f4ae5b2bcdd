"""A resumed run equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tests import survival, tiny
from tests.survival import build
from trl_trustkl import load_records
from trl_trustkl.run import checkpoint_folder, rng

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", survival.KINDS)
def test_a_run_that_ends_in_an_update_is_resumed_bit_for_bit(tmp_path, kind):
    build(tmp_path / "uninterrupted", kind).train()
    trainer = build(tmp_path / "cut", kind)
    measure = trainer.measure

    def measure_until_the_fifth(batch: Any) -> Any:
        if trainer.state.global_step == 4:
            raise survival.Killed
        return measure(batch)

    trainer.measure = measure_until_the_fifth
    with pytest.raises(survival.Killed):
        trainer.train()
    assert len(load_records(tmp_path / "cut")) == 4
    build(tmp_path / "cut", kind).train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "cut")


@pytest.mark.parametrize("update", [2, 4])
def test_a_run_is_resumed_from_a_path_and_repeats_the_later_updates(uninterrupted_run, run_copy, update):
    build(run_copy).train(resume_from_checkpoint=str(run_copy / f"checkpoint-{update}"))
    assert survival.same(uninterrupted_run, run_copy)
    assert [record["update"] for record in load_records(run_copy)] == [1, 2, 3, 4, 5, 6]
    assert len(list((run_copy / "earlier.1").glob("checkpoint-*"))) == (6 - update) // 2  # nothing is overwritten


def test_a_run_resumes_in_another_folder_with_its_records(uninterrupted_run, tmp_path):
    build(tmp_path / "new").train(resume_from_checkpoint=uninterrupted_run / "checkpoint-4")
    assert survival.same(uninterrupted_run, tmp_path / "new")
    assert len(load_records(uninterrupted_run)) == 6


def test_resuming_a_finished_run_makes_no_updates(uninterrupted_run, run_copy):
    trainer = build(run_copy)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and survival.same(uninterrupted_run, run_copy)


def test_a_schedule_without_an_end_may_be_made_longer(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    build(tmp_path / "uninterrupted", **constant).train()
    build(tmp_path / "longer", max_steps=4, **constant).train()
    build(tmp_path / "longer", **constant).train(resume_from_checkpoint=True)
    a, b = survival.tensors(tmp_path / "uninterrupted"), survival.tensors(tmp_path / "longer")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_truncated_and_later_lines_of_the_records_are_dropped_and_none_is_repeated(uninterrupted_run, run_copy):
    for name in ("bounds.jsonl", "completions.jsonl"):
        with open(run_copy / name, "ab") as file:
            file.write(b'{"update": 7, "epi')
    build(run_copy).train(resume_from_checkpoint=run_copy / "checkpoint-2")
    for name in ("bounds.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (run_copy / name).read_text().splitlines()]
        assert [row["update"] for row in rows] == [
            json.loads(line)["update"] for line in (uninterrupted_run / name).read_text().splitlines()
        ]


class Counter(TrainerCallback, ExportableState):
    """Counts updates, and changes a setting in the fourth."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.count = step, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.step
        if state.global_step == 3:
            args.kl_coef = 0.7

    def state(self) -> dict[str, Any]:
        return {"args": {"step": self.step}, "attributes": {"count": self.count}}


def test_what_callbacks_counted_and_changed_is_restored(tmp_path):
    def trainer(**changes: Any) -> Any:
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, **changes}
        return tiny.trainer(tmp_path, changes=settings | {"lr_scheduler_type": "constant"}, callbacks=[Counter()])

    trainer(max_steps=4).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    (counter,) = [cb for cb in resumed.callback_handler.callbacks if isinstance(cb, Counter)]
    assert counter.count == 6
    assert [record["anchor"]["coef"] for record in load_records(tmp_path)] == [0.05] * 3 + [0.7] * 3


def test_the_best_checkpoint_is_remembered_kept_and_loaded_at_the_end(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.2])
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    changes |= {"metric_for_best_model": "score", "save_strategy": "steps", "save_steps": 2, "max_steps": 8}

    def trainer(**more: Any) -> Any:
        made = tiny.trainer(
            tmp_path, changes=changes | {"lr_scheduler_type": "constant"} | more, eval_dataset=tiny.prompts(4)
        )
        made.evaluate = lambda *_, **__: {"eval_score": next(scores)}
        return made

    trainer(max_steps=6, load_best_model_at_end=True).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_metric == 0.9 and resumed.state.best_global_step == 4
    assert [folder.name for folder in checkpoint_folder.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    saved = survival.tensors(tmp_path, 4)
    weights = dict(resumed.model.policy.named_parameters())
    found = [name for name in saved if name.startswith("policy.safetensors")]
    assert found and all(torch.equal(saved[name], weights[name.split()[1]]) for name in found)


def test_the_comparison_notices_what_is_not_restored(uninterrupted_run, tmp_path, monkeypatch):
    """The comparison itself can fail: a run that is resumed without its random states differs."""
    resumed = build(tmp_path)
    monkeypatch.setattr(rng.ProcessRandomStates, "load_state_dict", lambda self, states: None)
    resumed.train(resume_from_checkpoint=uninterrupted_run / "checkpoint-4")
    assert not survival.same(uninterrupted_run, tmp_path)
