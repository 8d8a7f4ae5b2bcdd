"""A run that is resumed goes on as if it had never stopped, or says why it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tests import survival, tiny
from tests.pinned import on_pinned_transformers
from tests.survival import build
from trl_trustkl import TrustKLPPOConfig, load_records
from trl_trustkl.errors import CheckpointError, ConfigError
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run import resume_compatibility as settings
from trl_trustkl.run import rng
from trl_trustkl.run.checkpointer import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run with checkpoints of the updates 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder).train()
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


# -- as if it had never stopped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", survival.KINDS)
def test_a_run_that_ends_in_an_update_is_resumed_bit_for_bit(tmp_path, kind):
    build(tmp_path / "whole", kind).train()
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
    assert survival.same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("update", [2, 4])
def test_a_run_is_resumed_from_a_path_and_what_came_after_is_done_again(whole, copy, update):
    build(copy).train(resume_from_checkpoint=str(copy / f"checkpoint-{update}"))
    assert survival.same(whole, copy)
    assert [record["update"] for record in load_records(copy)] == [1, 2, 3, 4, 5, 6]
    assert len(list((copy / "earlier.1").iterdir())) == (6 - update) // 2  # nothing is overwritten


def test_a_run_goes_on_in_another_folder_with_its_records(whole, tmp_path):
    build(tmp_path / "new").train(resume_from_checkpoint=whole / "checkpoint-4")
    assert survival.same(whole, tmp_path / "new")
    assert len(load_records(whole)) == 6


def test_a_run_that_is_over_is_resumed_to_nothing(whole, copy):
    trainer = build(copy)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and survival.same(whole, copy)


def test_a_schedule_without_an_end_may_be_made_longer(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    build(tmp_path / "whole", **constant).train()
    build(tmp_path / "longer", max_steps=4, **constant).train()
    build(tmp_path / "longer", **constant).train(resume_from_checkpoint=True)
    a, b = survival.tensors(tmp_path / "whole"), survival.tensors(tmp_path / "longer")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_torn_and_late_lines_of_the_records_are_dropped_and_none_is_doubled(whole, copy):
    for name in ("bounds.jsonl", "completions.jsonl"):
        with open(copy / name, "ab") as file:
            file.write(b'{"update": 7, "epi')
    build(copy).train(resume_from_checkpoint=copy / "checkpoint-2")
    for name in ("bounds.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (copy / name).read_text().splitlines()]
        assert [row["update"] for row in rows] == [
            json.loads(line)["update"] for line in (whole / name).read_text().splitlines()
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
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    saved = survival.tensors(tmp_path, 4)
    weights = dict(resumed.model.policy.named_parameters())
    found = [name for name in saved if name.startswith("policy.safetensors")]
    assert found and all(torch.equal(saved[name], weights[name.split()[1]]) for name in found)


# -- which checkpoint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"cut"), "optimizer.pt has 3 bytes instead of"),
        (lambda folder: (folder / "value.safetensors").unlink(), "lacks value.safetensors"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: flip_a_byte(folder / "policy.safetensors"), "policy.safetensors is not what was written"),
        (lambda folder: flip_a_byte(folder / "optimizer.pt"), "optimizer.pt is not what was written"),
        (lambda folder: cut_in_half(folder / "adapter_model.safetensors"), "adapter_model.safetensors has"),
        (lambda folder: cut_in_half(folder / "manifest.json"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_recognised_and_the_last_whole_one_used(whole, copy, caplog, damage, what):
    damage(copy / "checkpoint-6")
    trainer = build(copy)
    assert find_checkpoint(True, copy) == copy / "checkpoint-4"
    assert any(what in record.getMessage() for record in caplog.records)
    with pytest.raises(CheckpointError) as error:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    assert what in str(error.value) and "`resume_from_checkpoint`" in str(error.value)
    trainer.train(resume_from_checkpoint=True)
    assert survival.same(whole, copy)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_without_a_whole_checkpoint_a_run_starts_afresh_with_a_warning(whole, tmp_path, caplog):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".unfinished-checkpoint-2").mkdir()
    build(tmp_path).train(resume_from_checkpoint=True)
    assert any("starting afresh" in record.getMessage() for record in caplog.records)
    assert survival.same(whole, tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_fresh_run_moves_old_checkpoints_aside(copy):
    trainer = build(copy, max_steps=2)
    trainer.train()
    assert names(copy) == ["checkpoint-2"]
    assert sorted(path.name for path in (copy / "earlier.1").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_no_more_checkpoints_are_kept_than_asked_for_and_the_last_whole_one_is(tmp_path):
    build(tmp_path, save_steps=1, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    checkpoint.rotate(tmp_path, 1, best=None)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_of_the_model_alone_cannot_be_resumed_from(tmp_path):
    build(tmp_path, save_only_model=True, max_steps=2).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    for wanted in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(CheckpointError, match="save_only_model=True"):
            build(tmp_path).train(resume_from_checkpoint=wanted)


def test_nothing_of_a_checkpoint_is_unpickled(copy, monkeypatch):
    original = torch.load

    def careful(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("weights_only") is True
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", careful)
    (copy / "checkpoint-6" / "training_args.bin").write_bytes(b"a pickle that nobody reads")
    manifest = json.loads((copy / "checkpoint-6" / "manifest.json").read_text())
    del manifest["files"]["training_args.bin"]
    (copy / "checkpoint-6" / "manifest.json").write_text(json.dumps(manifest))
    build(copy).train(resume_from_checkpoint=True)


# -- under other settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"kl_coef": 0.1}, ["`kl_coef`: 0.05 in the checkpoint, 0.1 now"]),
        (
            {"seed": 7, "cliprange": 0.3},
            ["`seed`: 42 in the checkpoint, 7 now", "`cliprange`: 0.2 in the checkpoint, 0.3 now"],
        ),
        ({"generation_kwargs": {"top_k": 5}}, ["`generation_kwargs`: None in the checkpoint, {'top_k': 5} now"]),
        ({"max_steps": 8}, ["`max_steps`: 6 in the checkpoint, 8 now", "schedule"]),
    ],
)
def test_settings_that_would_make_it_another_run_are_named(copy, changes, pieces):
    with pytest.raises(ConfigError) as error:
        build(copy, **changes).train(resume_from_checkpoint=True)
    assert all(piece in str(error.value) for piece in pieces), error.value


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ({"train_dataset": tiny.prompts(24)}, "rows of train_dataset: 16 in the checkpoint, 24 now"),
        ({"train_dataset": tiny.prompts(8)}, "rows of train_dataset: 16 in the checkpoint, 8 now"),
        ({"model": tiny.llama(num_hidden_layers=1)}, "trained numbers of the policy: "),
        ({"model": tiny.llama(num_hidden_layers=3)}, "trained numbers of the policy: "),
        ({"model": tiny.llama(hidden_size=64)}, "trained numbers of the value: 33 in the checkpoint, 65 now"),
        ({"value_model": tiny.scalar_model(tiny.llama())}, "trained numbers of the value: 33 in the checkpoint, "),
        ({"peft_config": None}, "adapter: "),
        ({"peft_config": tiny.lora(r=2)}, "adapter `r`: 4 in the checkpoint, 2 now"),
        ({"model": tiny.llama(vocab_size=50)}, "vocabulary size: 43 in the checkpoint, 50 now"),
    ],
)
def test_models_and_data_that_would_make_it_another_run_are_named(copy, arguments, piece):
    changes = {"max_steps": survival.UPDATES, **survival.KINDS["adapter and value head"][0]}
    changes |= {"lr_scheduler_type": "linear", "learning_rate": 1e-2, "optim": "adamw_torch"}
    with pytest.raises(ConfigError) as error:
        tiny.trainer(copy, changes=changes, **arguments).train(resume_from_checkpoint=True)
    assert piece in str(error.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_shape_of_a_fully_tuned_model_is_named(tmp_path, layers):
    kind = "all weights and a value model"
    build(tmp_path, kind, max_steps=2).train()
    settings, arguments = survival.KINDS[kind]
    changes = {"max_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-2, "optim": "adamw_torch"} | settings
    other = tiny.trainer(tmp_path, tiny.llama(num_hidden_layers=layers), changes=changes, **arguments())
    with pytest.raises(ConfigError, match="trained numbers of the policy"):
        other.train(resume_from_checkpoint=True)


def test_harmless_settings_may_change(copy):
    harmless = {"logging_steps": 1, "save_steps": 3, "save_total_limit": 5, "grace_seconds": 3.0, "run_name": "again"}
    build(copy, **harmless).train(resume_from_checkpoint=copy / "checkpoint-4")


@on_pinned_transformers("Each release has other settings.")
def test_every_setting_is_either_harmless_or_compared(tmp_path):
    fields = {field.name for field in dataclasses.fields(TrustKLPPOConfig) if field.init}
    assert set(settings.HARMLESS) <= fields
    assert len(set(settings.HARMLESS)) == len(settings.HARMLESS)
    args = tiny.config(tmp_path, lr_scheduler_type="linear")
    now = settings.compared(args)
    assert set(now) == fields - set(settings.HARMLESS)
    for name in now:
        changed = now | {name: "something else"}
        (difference,) = settings.differences(changed, now, args)
        assert ("`max_steps`" if name == "num_total_batches" else f"`{name}`") in difference
    assert not list(settings.differences(now, now, args))


def test_a_field_that_a_checkpoint_does_not_know_yet_counts_as_its_default(tmp_path):
    args = tiny.config(tmp_path, panic_kl=2.0)
    now = settings.compared(args)
    old = {name: value for name, value in now.items() if name != "panic_kl"}
    assert list(settings.differences(old, now, args)) == ["`panic_kl`: None in the checkpoint, 2.0 now"]
    assert not list(settings.differences(old, now | {"panic_kl": None}, args))


def test_what_is_saved_holds_no_token(tmp_path):
    build(tmp_path, hub_token="hf_secret", max_steps=2).train()
    texts = [path.read_text() for path in (tmp_path / "checkpoint-2").glob("*.json")]
    assert not any("hf_secret" in text for text in texts)


def test_the_comparison_notices_what_is_not_restored(whole, tmp_path, monkeypatch):
    """The comparison itself can fail: a run resumed without its random states is another one."""
    resumed = build(tmp_path)
    monkeypatch.setattr(rng.ProcessRandomStates, "load_state_dict", lambda self, states: None)
    resumed.train(resume_from_checkpoint=whole / "checkpoint-4")
    assert not survival.same(whole, tmp_path)
