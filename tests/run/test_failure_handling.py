"""Updates that fail: reward functions with errors, signals whose grace period is over, rejected updates."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import survival, tiny
from tests.processes import single_process
from trl_trustkl import load_records
from trl_trustkl.errors import NonFiniteRewardError, RefusedError, RewardError
from trl_trustkl.run import checkpoint_folder as checkpoint
from trl_trustkl.run.failure_handling import FailureHandling, reject, too_many_rejections
from trl_trustkl.run.signals import Overdue, StopRequest
from trl_trustkl.types import UpdateContext


def handling(stop: StopRequest | None = None, count: int = 1) -> FailureHandling:
    processes = single_process()
    processes.count = count
    return FailureHandling(StopRequest(60.0) if stop is None else stop, processes)


def raises(error: BaseException) -> Callable[[], Any]:
    def scoring() -> Any:
        raise error

    return scoring


def context(*, training: bool = True) -> UpdateContext:
    return UpdateContext(3, training, 0)


# -- scoring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_passed_on(training):
    of, scores = context(training=training), object()
    assert handling().score(of, lambda: scores) is scores and of.rejected is None


@pytest.mark.parametrize("training", [True, False])
def test_a_reward_that_fails_raises(training):
    of, error = context(training=training), RewardError("no answer")
    with pytest.raises(RewardError) as raised:
        handling().score(of, raises(error))
    assert raised.value is error and of.rejected is None


def test_a_reward_that_is_not_finite_rejects_an_update():
    of = context()
    assert handling().score(of, raises(NonFiniteRewardError("it is NaN"))) is None
    assert of.rejected == "it is NaN"


def test_a_reward_that_is_not_finite_raises_in_an_evaluation():
    of = context(training=False)
    with pytest.raises(NonFiniteRewardError, match="it is NaN"):
        handling().score(of, raises(NonFiniteRewardError("it is NaN")))
    assert of.rejected is None


@pytest.mark.parametrize("training", [True, False])
def test_other_errors_while_scoring_are_not_taken_for_a_rewards(training):
    with pytest.raises(ZeroDivisionError):
        handling().score(context(training=training), raises(ZeroDivisionError()))


@pytest.mark.parametrize("own", [None, NonFiniteRewardError("mine is NaN")])
def test_a_failure_elsewhere_raises_here_whatever_came_before_it(own, monkeypatch):
    """There are two processes, and the reward function of the other one failed."""
    parts, theirs = handling(count=2), RewardError("no answer there")
    monkeypatch.setattr(parts._processes, "gather_objects", lambda items: [*items, theirs])
    of = context()
    with pytest.raises(RewardError) as raised:
        parts.score(of, (lambda: 1) if own is None else raises(own))
    assert raised.value is theirs and of.rejected is None


def test_a_reward_that_is_not_finite_elsewhere_rejects_the_update_here(monkeypatch):
    parts, of = handling(count=2), context()
    monkeypatch.setattr(
        parts._processes, "gather_objects", lambda items: [*items, NonFiniteRewardError("theirs is NaN")]
    )
    assert parts.score(of, lambda: 1) is None and of.rejected == "theirs is NaN"


# -- an update that is given up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RewardError("no answer"), NonFiniteRewardError("NaN")])
@pytest.mark.parametrize("in_step", [True, False])
def test_a_failure_elsewhere_in_an_evaluation_raises_here_if_the_processes_are_in_step(in_step, error, monkeypatch):
    processes = single_process()
    monkeypatch.setattr(processes, "gather_objects", lambda own: [*own, error])
    part = FailureHandling(StopRequest(60.0), processes, in_step=in_step)
    if not in_step:
        assert part.score(context(training=False), lambda: 3) == 3
        return
    with pytest.raises(RewardError) as raised:
        part.score(context(training=False), lambda: 3)
    assert raised.value is error


class Update:
    """An update that ends with `error`; `called` lists what was called then, in order."""

    def __init__(self, parts: FailureHandling, error: BaseException | None, *, finished: bool = False) -> None:
        self.called: list[str] = []
        self.raised: BaseException | None = None
        try:
            with parts.update(
                lambda: finished, lambda: self.called.append("roll back"), lambda: self.called.append("save")
            ):
                if error is not None:
                    raise error
        except BaseException as raised:
            self.raised = raised


def test_an_update_that_ends_without_an_error_is_not_rolled_back():
    ended = Update(handling(), None)
    assert ended.called == [] and ended.raised is None


def test_an_overdue_update_is_rolled_back_silently():
    ended = Update(handling(), Overdue())
    assert ended.called == ["roll back"] and ended.raised is None


def test_an_evaluation_that_is_overdue_after_its_update_rolls_nothing_back():
    ended = Update(handling(), Overdue(), finished=True)
    assert ended.called == [] and ended.raised is None


def test_an_update_whose_reward_fails_is_rolled_back_the_state_before_it_saved_and_the_error_raised():
    error = RewardError("no answer")
    ended = Update(handling(), error)
    assert ended.called == ["roll back", "save"] and ended.raised is error


def test_an_update_whose_reward_fails_after_a_signal_is_only_rolled_back():
    """The run ends because of the signal, and saves its state then."""
    stop = StopRequest(60.0)
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        ended = Update(handling(stop), RewardError("no answer"))
    assert ended.called == ["roll back"] and ended.raised is None


@pytest.mark.parametrize(("count", "called"), [(1, ["save"]), (2, [])])
def test_an_evaluation_that_fails_after_its_update_rolls_nothing_back(count, called):
    error = RewardError("no answer")
    ended = Update(handling(count=count), error, finished=True)
    assert ended.called == called and ended.raised is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("a bug")])
def test_other_errors_leave_an_update_as_they_find_it(error):
    ended = Update(handling(), error)
    assert ended.called == [] and ended.raised is error


# -- signals -----------------------------------------------------------------------------------------------------------


def test_the_received_signal_is_reported():
    stop = StopRequest(60.0)
    with stop:
        parts = handling(stop)
        assert parts.signal() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert parts.signal() == signal.SIGTERM
        parts.give_up_if_overdue()  # there is a minute left


def test_an_update_is_given_up_when_its_grace_period_is_over():
    stop = StopRequest(0.0)
    with stop:
        parts = handling(stop)
        parts.give_up_if_overdue()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Overdue):
            parts.give_up_if_overdue()


def test_an_update_is_given_up_when_it_is_overdue_elsewhere(monkeypatch):
    parts = handling()
    monkeypatch.setattr(parts._processes, "max", lambda number: max(number, signal.SIGTERM))
    assert parts.signal() == signal.SIGTERM
    with pytest.raises(Overdue):
        parts.give_up_if_overdue()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_rejected_update_is_noted_and_named(caplog):
    of = context()
    reject(of, "the loss is not finite.")
    assert of.rejected == "the loss is not finite."
    assert "update 4 is rejected: the loss is not finite; the parameters" in caplog.text


def test_the_error_for_too_many_rejections_says_where_the_weights_are():
    error = too_many_rejections(5, 5, "the loss is not finite", Path("runs/checkpoint-7"))
    assert isinstance(error, RefusedError)
    assert (
        "5 updates in a row" in str(error)
        and "runs/checkpoint-7" in str(error)
        and "the loss is not finite" in str(error)
    )


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
    trainer(tmp_path / "uninterrupted").train()
    one, other = (
        [survival.without_clock(record) for record in load_records(tmp_path / name)]
        for name in ("cut", "uninterrupted")
    )
    assert one == other


def test_a_reward_function_that_fails_in_an_evaluation_leaves_the_finished_update_complete(tmp_path):
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
    reference = tiny.trainer(tmp_path / "uninterrupted", changes=changes | {"eval_strategy": "no", "max_steps": 2})
    reference.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in reference.model.named_parameters())
