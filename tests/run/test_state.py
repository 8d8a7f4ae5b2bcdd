"""The state of a run (counts, metrics and transformers' state) is restored from JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_trustkl.run.state import OnlineTrainerState, Progress, Rejections, RunState, TransformersState


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


# -- counts and metrics ------------------------------------------------------------------------------------------------


def test_rejections_are_counted_in_all_and_in_a_row():
    counts, seen = Rejections(), []
    for rejected in (False, True, True, False, True):
        counts = counts.after(rejected)
        seen.append(tuple(counts))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def filled() -> Progress:
    progress = Progress()
    progress.add({"kl": 1.0, "count": 3, "stopped": False, "binding": "clip", "score": None}, loss=0.5, rejected=True)
    progress.add({"kl": 2.0, "count": 4, "stopped": True, "binding": "none", "score": 0.25}, loss=-0.75, rejected=True)
    progress.add({"kl": 6.0, "count": 4, "binding": "lr", "score": None, "late": [1]}, loss=0.125, rejected=False)
    return progress


def test_a_log_has_the_mean_of_numbers_and_the_latest_of_everything_else():
    progress = filled()
    logs = progress.flush(3)
    assert logs == {"kl": 3.0, "count": 11 / 3, "stopped": True, "binding": "lr", "score": 0.25, "late": [1]}
    assert logs["stopped"] is True, "a truth value was averaged as a number"
    assert progress.logged_step == 3 and progress.last_loss == 0.125 and progress.rejections == (2, 0)


def test_a_log_begins_the_next_one():
    progress = filled()
    progress.flush(3)
    assert progress.flush(4) == {} and progress.logged_step == 4
    progress.add({"kl": 8.0}, loss=1.0, rejected=True)
    assert progress.flush(5) == {"kl": 8.0} and progress.rejections == (3, 1)


def test_progress_comes_back_from_a_file():
    progress, loaded = filled(), Progress()
    progress.logged_step = 7
    loaded.add({"kl": 100.0, "of another run": 1}, loss=9.0, rejected=True)
    loaded.load_state_dict(through_json(progress.state_dict()))
    assert loaded.rejections == progress.rejections and isinstance(loaded.rejections, Rejections)
    assert (loaded.logged_step, loaded.last_loss) == (7, 0.125)
    for each in (progress, loaded):
        each.add({"kl": 3.0, "new": 1}, loss=0.0, rejected=False)
    assert loaded.flush(8) == progress.flush(8)


def test_a_state_that_was_taken_does_not_change_with_the_run():
    progress = filled()
    state = progress.state_dict()
    before = through_json(state)
    progress.add({"kl": 3.0}, loss=0.0, rejected=True)
    assert state == before


def test_a_reset_forgets_everything():
    progress = filled()
    progress.reset()
    assert progress.state_dict() == Progress().state_dict() and progress.flush(0) == {}


# -- several pieces ----------------------------------------------------------------------------------------------------


class Piece:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def state_dict(self) -> dict[str, Any]:
        return {self.name: self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state[self.name]


def test_the_pieces_of_a_run_are_saved_together_and_each_loads_its_state():
    saved = RunState([Piece("a", [1, 2]), Piece("b", None), filled()])
    state = through_json(saved.state_dict())
    assert state.keys() == {"format", "a", "b", "refusals", "metrics", "logged_step", "last_loss"}
    assert state["format"] == 1
    a, b, progress = Piece("a", 0), Piece("b", 0), Progress()
    loaded = RunState(iter([a, b, progress]))
    loaded.load_state_dict(state)
    assert through_json(loaded.state_dict()) == state
    assert (a.value, b.value, progress.rejections) == ([1, 2], None, (2, 0))


# -- transformers' state -----------------------------------------------------------------------------------------------


class Counts(TrainerCallback, ExportableState):
    """A callback with a state."""

    def __init__(self, start: int) -> None:
        self.start, self.seen = start, 0

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"seen": self.seen}}


class Other(Counts):
    pass


class Control(ExportableState):
    """Like transformers' control: it has a state and is not a callback."""

    seen = 5

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seen": self.seen}}


def advanced() -> OnlineTrainerState:
    history = [{"loss": 1 / 3, "step": 1}, {"binding": "clip", "step": 2}]
    return OnlineTrainerState(
        epoch=0.5, global_step=2, max_steps=9, log_history=history, best_metric=0.1, best_global_step=1,
        best_model_checkpoint="runs/checkpoint-1", episode=16,
    )  # fmt: skip


def test_transformers_state_is_loaded_in_place():
    state, held = advanced(), OnlineTrainerState(global_step=99, episode=1)
    stored = through_json(TransformersState(state, list).state_dict())
    assert list(stored) == sorted(stored) and stored.keys() == {f.name for f in dataclasses.fields(OnlineTrainerState)}
    TransformersState(held, list).load_state_dict(stored)
    assert dataclasses.asdict(held) == dataclasses.asdict(state), "the state was replaced instead of updated"
    assert held.episode == 16 and held.log_history[0]["loss"] == 1 / 3


def test_callbacks_get_their_own_states_back_in_their_order():
    before = [Counts(1), Other(7), Counts(2), Control()]
    for number, each in enumerate(before):
        each.seen = 10 * (number + 1)
    stored = through_json(TransformersState(advanced(), lambda: before).state_dict())
    after = [Other(7), Counts(1), Counts(2), Control()]
    state = OnlineTrainerState()
    TransformersState(state, lambda: after).load_state_dict(stored)
    assert [(type(each).__name__, each.seen) for each in after] == [
        ("Other", 20), ("Counts", 10), ("Counts", 30), ("Control", 5)
    ]  # fmt: skip
    assert state.stateful_callbacks["Control"]["attributes"] == {"seen": 40}


@pytest.mark.parametrize("after", [[], [Other(0)], [Counts(1)]])
def test_callbacks_may_come_and_go(after):
    before = [Counts(1), Counts(2)]
    before[0].seen = 3
    stored = through_json(TransformersState(advanced(), lambda: before).state_dict())
    TransformersState(OnlineTrainerState(), lambda: after).load_state_dict(stored)
    assert [each.seen for each in after] == [
        3 if isinstance(each, Counts) and not isinstance(each, Other) else 0 for each in after
    ]


def test_the_states_of_callbacks_are_saved_as_they_are_now():
    callback = Counts(1)
    part = TransformersState(advanced(), lambda: [callback])
    part.state_dict()
    callback.seen = 8
    assert part.state_dict()["stateful_callbacks"]["Counts"]["attributes"] == {"seen": 8}
