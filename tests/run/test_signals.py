"""SIGTERM and SIGINT: the first finishes the update and saves it, the second ends the run at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests import survival, tiny
from tests.survival import build, counted
from trl_trustkl import load_records
from trl_trustkl.errors import Interrupted
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run.signals import StopRequest

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]


def terminate(name: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("phase", ["rollout", "score", "optimise", "step", "measure", "_end_update", "write"])
def test_sigterm_in_any_phase_finishes_the_update_and_saves_it(uninterrupted_run, tmp_path, phase):
    number = {"step": 9, "write": 0}.get(phase, 2)
    trainer = build(tmp_path)
    with pytest.raises(Interrupted) as ended, counted(trainer, (phase, number), terminate):
        trainer.train()
    assert ended.value.code == 143 and trainer._loop.interrupted == signal.SIGTERM
    done = 2 if phase == "write" else 3
    assert trainer.state.global_step == len(load_records(tmp_path)) == done
    assert checkpoint.damage(tmp_path / f"checkpoint-{done}") is None
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)


class TerminatesIn(TrainerCallback):
    """Gets SIGTERM in an event, as while a callback renders a report or uploads a model."""

    def __init__(self, event: str) -> None:
        setattr(self, f"on_{event}", self._terminate)

    def _terminate(self, args, state, control, **kwargs):
        if state.global_step in (0, state.max_steps):
            terminate("callback")


@pytest.mark.parametrize(
    ("event", "saves", "updates"),
    [
        ("train_begin", "steps", 0),
        ("step_end", "no", 6),
        ("save", "steps", 6),
        ("train_end", "steps", 6),
        ("train_end", "no", 6),
    ],
)
def test_sigterm_while_a_callback_works_ends_the_run_as_announced(tmp_path, event, saves, updates):
    trainer = build(tmp_path, save_strategy=saves)
    trainer.add_callback(TerminatesIn(event))
    with pytest.raises(Interrupted) as ended:
        trainer.train()
    assert ended.value.code == 143 and trainer.state.global_step == updates
    assert updates == 0 or checkpoint.newest_complete(tmp_path).name == f"checkpoint-{updates}"


def test_sigterm_at_the_end_saves_no_checkpoint_of_the_best_weights_as_the_last(tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl",
    }
    changes |= {"save_strategy": "best", "max_steps": 3}
    trainer = tiny.trainer(
        tmp_path, eval_dataset=tiny.prompts(4), changes=changes, callbacks=[TerminatesIn("train_end")]
    )
    with pytest.raises(Interrupted):
        trainer.train()
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("phase", ["rollout", "score", "step", "optimise"])
def test_an_update_beyond_its_grace_period_is_given_up_and_the_one_before_it_saved(uninterrupted_run, tmp_path, phase):
    trainer = build(tmp_path, grace_seconds=0.0)
    number = 9 if phase == "step" else 2
    with pytest.raises(Interrupted), counted(trainer, (phase, number), terminate):
        trainer.train()
    assert trainer.state.global_step == len(load_records(tmp_path)) == 2
    build(tmp_path).train(resume_from_checkpoint=True)
    assert survival.same(uninterrupted_run, tmp_path)


def test_an_update_that_is_given_up_is_rolled_back_before_the_save(uninterrupted_run, tmp_path):
    """If there is no checkpoint of the previous update, one is saved from the state after the rollback."""
    trainer = build(tmp_path, grace_seconds=0.0, save_strategy="no", attribution_every=0)
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
    expected, found = survival.tensors(uninterrupted_run, 4), survival.tensors(tmp_path, 4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "checkpoint-4" / "rng.json").read_text() == (
        uninterrupted_run / "checkpoint-4" / "rng.json"
    ).read_text()


def test_ctrl_c_has_a_separate_exit_status_and_a_second_one_stops_immediately(uninterrupted_run, tmp_path):
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


def test_the_handlers_are_installed_only_during_a_run_and_only_in_the_main_thread():
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


def test_after_a_run_nothing_is_overdue_and_no_wait_is_cut_short():
    stop = StopRequest(0.0)
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.overdue and stop.wait(0) and stop.received == signal.SIGTERM
    assert not stop.overdue and not stop.wait(0)
    with stop:
        assert not stop.overdue and stop.received is None


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(1.0) as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_sigterm_handler_of_transformers_does_not_interfere(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = build(tmp_path, enable_jit_checkpoint=True, max_steps=1)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_output_to_a_pipe_without_a_reader_is_discarded_after_a_signal():
    """As of `python train.py 2>&1 | tee log`, where Ctrl-C also ends tee."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    reader, writer = os.pipe()
    os.close(reader)
    stop = StopRequest(grace_seconds=20.0)
    try:
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
        stop.drop_closed_outputs()
        with pytest.raises(BrokenPipeError):  # not before a signal
            os.write(1, b"lost")
        with stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.drop_closed_outputs()
        found = [os.write(descriptor, b"lost") for descriptor in (1, 2)]
    finally:
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(writer)
    assert found == [4, 4]
