"""The loop over updates: what callbacks request, the order of events, and checkpoints."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from transformers import TrainerCallback

from tests import tiny
from tests.watched import run, watched
from tests.weights import same, trained_weights
from trl_trustkl import load_records
from trl_trustkl.ppo import loop

pytestmark = pytest.mark.filterwarnings("ignore")


class Control(TrainerCallback):
    """Sets a field of the control at the end of an update, and counts the events that follow."""

    def __init__(self, field: str = "", at: int = 2) -> None:
        self.field, self.at = field, at
        self.events: Counter = Counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.events["step"] += 1
        if self.field and state.global_step == self.at:
            setattr(control, self.field, True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events["log"] += 1
        self.events[f"log at {state.global_step}"] += 1

    def on_save(self, args, state, control, **kwargs):
        self.events[f"save at {state.global_step}"] += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.events[f"evaluate at {state.global_step}"] += 1


QUIET = {"logging_strategy": "no", "logging_steps": 500}


def test_a_callback_stops_the_run(tmp_path):
    watch = Control("should_training_stop")
    _, records = run(tmp_path, changes={"max_steps": 5}, callbacks=[watch])
    assert watch.events["step"] == len(records) == 2


def test_a_callback_saves_a_checkpoint(tmp_path):
    watch = Control("should_save")
    run(tmp_path, callbacks=[watch])
    assert watch.events["save at 2"] == 1
    assert [folder.name for folder in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]


def test_a_callback_evaluates(tmp_path):
    watch = Control("should_evaluate")
    run(tmp_path, callbacks=[watch], eval_dataset=tiny.prompts(4))
    assert watch.events["evaluate at 2"] == 1
    assert sum(count for event, count in watch.events.items() if event.startswith("evaluate")) == 1


def test_a_callback_is_told_that_a_pass_cannot_be_cut_short(tmp_path, caplog):
    _, records = run(tmp_path, changes={"max_steps": 4}, callbacks=[Control("should_epoch_stop")])
    assert len(records) == 4 and caplog.text.count("`should_epoch_stop`, which has no effect") == 1


def test_a_callback_logs(tmp_path):
    watch = Control("should_log")
    run(tmp_path, changes=QUIET, callbacks=[watch])
    assert watch.events["log at 2"] == 1 and watch.events["log at 1"] == 0


def test_strategies_by_steps_are_honoured(tmp_path):
    watch = Control()
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"logging_steps": 2, "per_device_eval_batch_size": 3}
    trainer, _ = run(tmp_path, changes=changes, callbacks=[watch], eval_dataset=tiny.prompts(4))
    happened = {event for event in watch.events if event.startswith(("save", "evaluate"))}
    assert happened == {"save at 4", "evaluate at 2", "evaluate at 4"}
    assert {int(event.split()[-1]) for event in watch.events if event.startswith("log at")} == {2, 4}
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert [entry["update"] for entry in logged] == [2, 4]


@pytest.mark.parametrize(
    ("steps", "stop_at", "expected"), [(1, None, {1}), (3, None, {2, 3}), (4, None, {2, 4}), (5, 3, {2, 3})]
)
def test_strategies_by_epochs_see_the_end_of_a_run_within_a_pass(tmp_path, steps, stop_at, expected):
    watch = Control("should_training_stop", stop_at) if stop_at else Control()
    changes = {f"{what}_strategy": "epoch" for what in ("save", "eval", "logging")} | {"max_steps": steps}
    run(tmp_path, changes=changes, callbacks=[watch], eval_dataset=tiny.prompts(4))
    for what in ("save", "evaluate"):
        assert {e: n for e, n in watch.events.items() if e.startswith(what)} == {f"{what} at {u}": 1 for u in expected}
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == expected


def test_an_evaluation_at_the_start_comes_first_and_not_again_after_a_resume(tmp_path):
    data = {"eval_dataset": tiny.prompts(4)}
    changes = {"eval_on_start": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    one, other = Control(), Control()
    run(tmp_path, changes=changes, callbacks=[one], **data)
    assert one.events["evaluate at 0"] == 1
    resumed = watched(tmp_path, changes=changes, callbacks=[other], **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.events["step"] == 1 and not any(event.startswith("evaluate") for event in other.events)


def test_the_cache_is_emptied_as_often_as_configured(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "clear_device_cache", lambda: calls.append(1))
    run(tmp_path, changes={"torch_empty_cache_steps": 2, "max_steps": 4})
    assert len(calls) == 2


def test_what_is_logged_is_the_mean_since_the_last_log(tmp_path):
    trainer, records = run(tmp_path, changes={"max_steps": 2, "logging_steps": 2})
    (log,) = (entry for entry in trainer.state.log_history if "objective/kl" in entry)
    assert log["trust/kl"] == pytest.approx(sum(r["trust"]["kl"] for r in records) / 2)
    assert log["score"] == pytest.approx(sum(r["score"] for r in records) / 2)


def test_on_step_end_comes_after_the_record(tmp_path):
    class Order(TrainerCallback):
        events: list[str] = []

        def on_record(self, args, state, control, record, completions):
            self.events.append(f"record {record.update}")

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(f"step {state.global_step} with {len(load_records(tmp_path))} records")

    run(tmp_path, callbacks=[order := Order()], changes={"max_steps": 2})
    assert order.events == ["record 1", "step 1 with 1 records", "record 2", "step 2 with 2 records"]


@pytest.mark.parametrize("value", ["head", "model"])
def test_a_checkpoint_holds_the_policy_the_value_and_the_controller(tmp_path, value):
    from safetensors.torch import load_file

    changes = {"save_strategy": "steps", "save_steps": 2, "kl_controller": "adaptive", "kl_target": 1.0}
    arguments = {"value_model": tiny.scalar_model(tiny.llama())} if value == "model" else {}
    trainer, _ = run(tmp_path, changes=changes | {"max_steps": 2}, **arguments)
    folder = tmp_path / "checkpoint-2"
    saved, live = load_file(folder / "value.safetensors"), trained_weights(trainer.model.value)
    assert same(dict(sorted(saved.items())), dict(sorted(live.items())))
    assert (folder / "adapter_model.safetensors").exists() and (folder / "optimizer.pt").exists()
    state = json.loads((folder / "trustkl_state.json").read_text())
    assert state["kl_controller"]["coef"] == trainer.parts.coefficients.kl_state.coef


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"load_best_model_at_end": True}, {"checkpoint-1", "checkpoint-3"}),
        ({"save_strategy": "best"}, {"checkpoint-1"}),
    ],
    ids=["at the end", "the best"],
)
def test_the_checkpoint_kept_as_the_best_by_kl_is_the_one_with_the_lowest(tmp_path, how, kept):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
    }
    changes |= {"metric_for_best_model": "kl", "save_total_limit": 1} | how
    trainer, _ = run(tmp_path, changes=changes, eval_dataset=tiny.prompts(4))
    found = {log["step"]: log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}
    assert 0 < found[1] < found[2] < found[3]  # the policy moves away from the reference
    assert trainer.state.best_global_step == 1 and trainer.state.best_metric == found[1]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == kept  # with the last one, which a resumed run needs
