"""What ends a run before its time, and that nothing is lost by it: kills, signals, full disks, refused updates, rewards."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import survival, tiny
from tests.survival import PHASES, build, counted, cut_off
from trl_trustkl import load_records
from trl_trustkl.errors import Interrupted, RefusedError, RewardError, SaveError
from trl_trustkl.rollout.scorer import Scorer
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run.checkpointer import find_checkpoint
from trl_trustkl.run.signals import StopRequest
from trl_trustkl.trust.snapshot import UpdateSnapshot

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, and the names of its moments."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder)
    with counted(trainer, -1, survival.kill) as seen:
        trainer.train()
    (folder / "moments.json").write_text(json.dumps(seen))
    return folder


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("rollout", 3), ("step", 14), ("measure", 4), ("append_line", 30), ("save_file", 3), ("save", 4), ("fsync", 25),
        ("rename", 1), ("write_text", 7),
    ],
)  # fmt: skip
def test_a_run_cut_off_at_a_moment_is_resumed_bit_for_bit(whole, tmp_path, name, number):
    assert cut_off(build(tmp_path), (name, number)) == name
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_run_cut_off_while_an_old_checkpoint_is_deleted_is_resumed(tmp_path, monkeypatch):
    build(tmp_path / "whole", save_total_limit=1).train()
    trainer = build(tmp_path / "cut", save_total_limit=1)
    renames: list[Any] = []
    rename = os.rename

    def killed_after_the_third(*args: Any) -> None:  # checkpoint-2 in place, checkpoint-4 in place, checkpoint-2 doomed
        rename(*args)
        renames.append(args)
        if len(renames) == 3:
            raise survival.Killed

    monkeypatch.setattr(os, "rename", killed_after_the_third)
    with pytest.raises(survival.Killed):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    build(tmp_path / "cut", save_total_limit=1).train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "whole", tmp_path / "cut")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["checkpoint-6"]


def test_a_run_cut_off_between_a_checkpoint_s_rename_and_the_next_record_is_resumed(whole, tmp_path, monkeypatch):
    trainer = build(tmp_path)
    rename = os.rename

    def killed_after_checkpoint_4(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "checkpoint-4":
            raise survival.Killed

    monkeypatch.setattr(os, "rename", killed_after_checkpoint_4)
    with pytest.raises(survival.Killed):
        trainer.train()
    monkeypatch.undo()
    resumed = build(tmp_path)
    assert find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-4" and len(load_records(tmp_path)) == 4
    resumed.train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [*((kind, 20) for kind in survival.KINDS), (survival.SMOLLM2, 1)])
def test_runs_killed_by_sigkill_are_resumed_bit_for_bit(tmp_path, kind, count):
    kills = survival.program("tests.survival", tmp_path, kind, count, 1)
    assert len(kills) == count
    assert {entry["ended"] for entry in kills} == {-signal.SIGKILL}
    assert {entry["resumed"] for entry in kills} == {0}, (tmp_path / "log").read_text()[-2000:]
    equal = [survival.same(tmp_path / "whole", Path(entry["run"])) for entry in kills]
    print(f"{sum(equal)} of {count}, killed in {', '.join(sorted({entry['in'] for entry in kills}))}")
    assert all(equal), [entry for entry, good in zip(kills, equal, strict=True) if not good]


# -- signals -----------------------------------------------------------------------------------------------------------


def terminate(name: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("phase", ["rollout", "score", "optimise", "step", "measure", "_end_update", "write"])
def test_sigterm_in_any_phase_finishes_the_update_and_saves_it(whole, tmp_path, phase):
    number = {"step": 9, "write": 0}.get(phase, 2)
    trainer = build(tmp_path)
    with pytest.raises(Interrupted) as ended, counted(trainer, (phase, number), terminate):
        trainer.train()
    assert ended.value.code == 143 and trainer._loop.interrupted == signal.SIGTERM
    done = 2 if phase == "write" else 3
    assert trainer.state.global_step == len(load_records(tmp_path)) == done
    assert checkpoint.damage(tmp_path / f"checkpoint-{done}") is None
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)


@pytest.mark.parametrize("phase", ["rollout", "score", "step", "optimise"])
def test_an_update_beyond_its_grace_period_is_given_up_and_the_one_before_it_saved(whole, tmp_path, phase):
    trainer = build(tmp_path, grace_seconds=0.0)
    number = 9 if phase == "step" else 2
    with pytest.raises(Interrupted), counted(trainer, (phase, number), terminate):
        trainer.train()
    assert trainer.state.global_step == len(load_records(tmp_path)) == 2
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)


def test_what_a_given_up_update_did_is_undone_before_it_is_saved(whole, tmp_path):
    """With no checkpoint of the update before, the one that is saved is made of the state it left."""
    trainer = build(tmp_path, grace_seconds=0.0, save_strategy="no")
    with pytest.raises(Interrupted), counted(trainer, -1, terminate) as seen:
        step = torch.optim.AdamW.step
        calls: list[int] = []

        def terminated_in_the_fifth_update(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 4 * 4 + 2:
                terminate("step")
            return step(*args, **kwargs)

        torch.optim.AdamW.step = terminated_in_the_fifth_update
        try:
            trainer.train()
        finally:
            torch.optim.AdamW.step = step
    assert "step" in seen
    expected, found = survival.tensors(whole, 4), survival.tensors(tmp_path, 4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "checkpoint-4" / "rng.json").read_text() == (whole / "checkpoint-4" / "rng.json").read_text()


def test_ctrl_c_has_its_own_exit_status_and_a_second_one_stops_at_once(whole, tmp_path):
    with (
        pytest.raises(Interrupted) as ended,
        counted(trainer := build(tmp_path), ("score", 0), lambda name: os.kill(os.getpid(), signal.SIGINT)),
    ):
        trainer.train()
    assert ended.value.code == 130 and len(load_records(tmp_path)) == 1

    def twice(name: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), counted(trainer := build(tmp_path / "b"), ("score", 0), twice):
        trainer.train()
    assert not load_records_or_none(tmp_path / "b")


def load_records_or_none(folder: Path) -> list[dict[str, Any]]:
    return load_records(folder) if (folder / "bounds.jsonl").exists() else []


def test_the_handlers_are_there_only_while_a_run_is_and_only_in_the_main_thread():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest(1.0):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    seen = []

    def elsewhere() -> None:
        with StopRequest(1.0):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[0]]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(1.0) as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_transformers_own_handler_of_sigterm_does_not_get_in_the_way(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = build(tmp_path, enable_jit_checkpoint=True, max_steps=1)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


# -- disks -------------------------------------------------------------------------------------------------------------


def no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "number"), [("save_file", 3), ("save", 4), ("fsync", 30), ("rename", 1), ("write_text", 7)]
)
def test_a_full_disk_during_a_save_ends_the_run_and_leaves_the_last_whole_checkpoint(whole, tmp_path, name, number):
    trainer = build(tmp_path)
    with pytest.raises(SaveError) as error, counted(trainer, (name, number), no_space):
        trainer.train()
    for piece in (
        "`output_dir`",
        "checkpoint-4",
        "No space left",
        "checkpoint-2 is whole",
        "resume_from_checkpoint=True",
    ):
        assert piece in str(error.value)
    assert not list(tmp_path.glob(".unfinished*"))
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)


def test_a_full_disk_at_a_record_ends_the_run_and_the_line_cut_short_is_dropped(whole, tmp_path):
    with pytest.raises(OSError), counted(trainer := build(tmp_path), ("append_line", 30), no_space):
        trainer.train()
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(whole, tmp_path)


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path):
    """As a folder that is read-only, also for a superuser: a file is in its place."""
    trainer = build(tmp_path / "run", max_steps=2)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / ".unfinished-checkpoint-2").write_text("a file where the folder should be")
    remove = checkpoint.remove_unfinished
    checkpoint.remove_unfinished = lambda folder: None
    try:
        with pytest.raises(SaveError, match="there is no earlier checkpoint"):
            trainer.train()
    finally:
        checkpoint.remove_unfinished = remove


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_record_that_cannot_be_written_is_an_error_of_ours():
    from trl_trustkl.records import append_line

    with pytest.raises(SaveError, match="record of update 3 could not be appended to /dev/full"):
        append_line(Path("/dev/full"), {"update": 3})


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_an_update_that_is_undone_leaves_the_optimizer_as_it_was(tmp_path):
    trainer = build(
        tmp_path, panic_kl=1e-9, max_refused=3, save_strategy="no", max_steps=5, lr_scheduler_type="constant"
    )
    with pytest.raises(RefusedError) as error:
        trainer.train()
    for piece in ("3 updates in a row", "`max_refused` got 3", "panic_kl", "checkpoint-3", "learning_rate"):
        assert piece in str(error.value)
    found = load_records(tmp_path)
    assert len(found) == 3 and all("above panic_kl = 1e-09" in record["refused"] for record in found)
    assert all(record["trust"]["kl"] == 0 < record["trust"]["kl_proposed"] for record in found)
    fresh = build(tmp_path / "fresh")
    after = dict(trainer.model.named_parameters())
    assert all(
        torch.equal(weight, after[name]) for name, weight in fresh.model.named_parameters() if weight.requires_grad
    )
    assert not trainer.optimizer.state
    assert checkpoint.damage(tmp_path / "checkpoint-3") is None


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_a_starting_point_restores_parameters_and_optimizer_bit_for_bit(kind):
    policy, value = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    parameters = [*policy.parameters(), *value.parameters()]
    settings = {"SGD": {"momentum": 0.9}}.get(kind, {})
    optimizer = getattr(torch.optim, kind)(parameters, lr=0.1, **settings)

    def step() -> None:
        value(policy(torch.randn(5, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> list[Tensor]:
        entries = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return [*(p.detach().clone() for p in parameters), *(v.clone() for v in entries)]

    step()
    before = state()
    start = UpdateSnapshot(list(policy.parameters()), list(value.parameters()), optimizer)
    step()
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    start.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_updates_that_are_refused_now_and_then_do_not_end_a_run(tmp_path):
    def sometimes(prompts: list, completions: list, trainer_state: Any = None, **_: Any) -> list[float]:
        good = tiny.good_words(prompts, completions)
        return [float("nan"), *good[1:]] if trainer_state.global_step % 2 else good

    trainer = tiny.trainer(tmp_path, changes={"max_steps": 6, "max_refused": 2}, reward_funcs=sometimes)
    output = trainer.train()
    found = load_records(tmp_path)
    assert [record["refused"] is not None for record in found] == [False, True] * 3
    assert "`sometimes` returned nan for completion 0" in found[1]["refused"] and found[1]["score"] is None
    assert output.metrics["refused_updates"] == 3


def failing(times: int) -> Callable:
    calls: list[int] = []

    def flaky(prompts: list, completions: list, **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) <= times:
            raise ConnectionError("the service is down")
        return tiny.good_words(prompts, completions)

    return flaky


def test_a_reward_function_is_tried_again_as_often_as_asked(tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(StopRequest, "wait", lambda self, seconds: waited.append(seconds))
    tiny.trainer(tmp_path / "a", changes={"reward_retries": 3}, reward_funcs=failing(3)).train()
    assert waited == [1.0, 2.0, 4.0] and len(load_records(tmp_path / "a")) == 3
    with pytest.raises(RewardError, match="the service is down"):
        tiny.trainer(tmp_path / "b", changes={"reward_retries": 1}, reward_funcs=failing(2)).train()


def test_the_pause_before_a_retry_has_a_limit():
    waited: list[float] = []
    with pytest.raises(RewardError):
        scorer = Scorer([], [], batch_size=1, retries=9, wait=lambda seconds: bool(waited.append(seconds)))
        scorer._with_retries(raise_reward_error)
    assert waited == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def raise_reward_error() -> Any:
    raise RewardError("no")


def test_a_reward_function_that_fails_ends_the_run_with_the_last_update_saved(tmp_path):
    def fails_later(prompts: list, completions: list, trainer_state: Any = None, **_: Any) -> list[float]:
        draw = random.random()
        if trainer_state.global_step == 2 and state["broken"]:
            raise ConnectionError("the service is down")
        return [score + draw for score in tiny.good_words(prompts, completions)]

    def trainer(folder: Path) -> Any:
        return tiny.trainer(folder, changes={"max_steps": 4, "save_strategy": "no"}, reward_funcs=fails_later)

    state = {"broken": True}
    with pytest.raises(RewardError):
        trainer(tmp_path / "cut").train()
    state["broken"] = False
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    trainer(tmp_path / "whole").train()
    one, other = (
        [survival.without_clock(record) for record in load_records(tmp_path / name)] for name in ("cut", "whole")
    )
    assert one == other


def test_a_reward_function_that_fails_in_an_evaluation_leaves_the_finished_update_whole(tmp_path):
    calls: list[int] = []

    def fails_in_the_evaluation(prompts: list, completions: list, **_: Any) -> list[float]:
        calls.append(len(prompts))
        if len(prompts) == 4:  # the evaluation's batch
            raise ConnectionError("the service is down")
        return tiny.good_words(prompts, completions)

    changes = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 4}
    changes |= {"lr_scheduler_type": "constant"}
    trainer = tiny.trainer(
        tmp_path, changes=changes, reward_funcs=fails_in_the_evaluation, eval_dataset=tiny.prompts(4)
    )
    with pytest.raises(RewardError):
        trainer.train()
    assert calls == [8, 8, 4] and trainer.state.global_step == 2 and trainer.state.episode == 16
    assert checkpoint.damage(tmp_path / "checkpoint-2") is None
    reference = tiny.trainer(tmp_path / "whole", changes=changes | {"eval_strategy": "no", "max_steps": 2})
    reference.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in reference.model.named_parameters())


# -- for long ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_updates_leave_memory_and_file_handles_as_they_were(tmp_path):
    from benchmarks.soak import soak

    gc.collect()
    found = soak(tmp_path, updates=200)
    print(found)
    assert found["handles_at_the_end"] <= found["handles_at_the_start"]
    assert found["bytes_per_update_second_half"] < 20_000


def test_every_phase_is_a_moment(whole):
    assert set(PHASES) <= set(json.loads((whole / "moments.json").read_text()))
