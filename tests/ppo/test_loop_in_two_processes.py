"""What a callback requests on one process alone is done by both. The tests start this file as a program in two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests import survival, tiny
from tests.processes import ROOT, in_two_processes

WITHIN, AT_THE_END = {"evaluate": [], "save": []}, {"evaluate": [2, 4], "save": []}
EXPECTED: dict[tuple[str, str], dict[str, Any]] = {
    ("should_log", "step_end"): WITHIN | {"log": [2], "updates": 4},
    ("should_log", "epoch_end"): WITHIN | {"log": [2], "updates": 4},
    ("should_evaluate", "step_end"): WITHIN | {"log": [2], "evaluate": [2], "updates": 4},
    ("should_evaluate", "epoch_end"): WITHIN | {"log": [2], "evaluate": [2], "updates": 4},
    ("should_save", "step_end"): WITHIN | {"log": [], "save": [2], "updates": 4},
    ("should_save", "epoch_end"): WITHIN | {"log": [], "save": [2], "updates": 4},
    ("should_save", "evaluate"): AT_THE_END | {"log": [2, 4], "save": [2], "updates": 4},
    ("should_training_stop", "step_end"): WITHIN | {"log": [], "updates": 2},
    ("should_training_stop", "epoch_end"): WITHIN | {"log": [], "updates": 2},
    ("should_training_stop", "evaluate"): {"log": [2], "evaluate": [2], "save": [], "updates": 2},
}
"""By what is requested at the second of four updates, and in which event: the updates at which both processes log, evaluate
and save, and the number of updates. An evaluation is logged; it is requested by `eval_steps` if it is the event."""


class Asks(TrainerCallback):
    """Requests something in an event of the second update, on the second process; counts what both processes do."""

    def __init__(self, rank: int, request: str, event: str) -> None:
        self.asks, self.request, self.event = rank == 1, request, event
        self.seen: dict[str, list[int]] = {"log": [], "evaluate": [], "save": []}

    def on_step_end(self, args, state, control, **kwargs):
        self._ask("step_end", state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._ask("epoch_end", state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen["evaluate"].append(state.global_step)
        self._ask("evaluate", state, control)

    def on_log(self, args, state, control, **kwargs):
        self.seen["log"].append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.seen["save"].append(state.global_step)

    def _ask(self, event: str, state: Any, control: Any) -> None:
        if self.asks and event == self.event and state.global_step == 2:
            setattr(control, self.request, True)


def program(folder: Path) -> None:
    """Make four updates, two passes over the prompts, for each case; each process writes what it did."""
    survival.quieten()
    found = []
    for request, event in EXPECTED:
        every = {"eval_strategy": "steps", "eval_steps": 2} if event == "evaluate" else {}
        trainer = tiny.trainer(
            folder / f"{request}-{event}", train_dataset=tiny.prompts(16), eval_dataset=tiny.prompts(4),
            changes={"max_steps": 4, "logging_strategy": "no", "per_device_eval_batch_size": 2, **every},
        )  # fmt: skip
        asks = Asks(trainer.accelerator.process_index, request, event)
        trainer.add_callback(asks)
        trainer.train()
        found.append({**asks.seen, "updates": trainer.state.global_step})
    accelerator = trainer.accelerator
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("control")
    in_two_processes("-m", "tests.ppo.test_loop_in_two_processes", str(folder), cwd=ROOT)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_what_one_process_requests_is_done_by_both(found, case):
    for each in found:
        assert each[list(EXPECTED).index(case)] == EXPECTED[case]


if __name__ == "__main__":
    program(Path(sys.argv[1]))
