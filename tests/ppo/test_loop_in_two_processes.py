"""Two processes: what a callback requests on one of them is done by both, what reward functions log on one of them is logged
for both, and a row of a stream that one of them cannot use ends both. The tests start this file as a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import TrainerCallback

from tests import survival, tiny
from tests.processes import ROOT, in_two_processes
from trl_trustkl import load_records
from trl_trustkl.errors import DataError
from trl_trustkl.rollout.prompt_stream import PromptStream

pytestmark = pytest.mark.processes
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
    survival.quieten()
    ask(folder)
    log_on_one(folder)
    read_a_stream(folder)


def ask(folder: Path) -> None:
    """Make four updates, two passes over the prompts, for each case; each process writes what it did."""
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
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


def log_on_one(folder: Path) -> None:
    """Train with a reward function that logs one of its columns and one of its metrics only on the second process."""

    def func(completions: list, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("rank", rank)
        log_extra("rank", [rank] * len(completions))
        if rank == 1:
            log_metric("only", 5.0)
            log_extra("only", ["here"] * len(completions))
        return [0.0] * len(completions)

    trainer = tiny.trainer(folder / "logs", reward_funcs=func, changes={"max_steps": 1})
    rank = trainer.accelerator.process_index
    trainer.train()
    (folder / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history[0]))


def read_a_stream(folder: Path) -> None:
    """Train on a stream, and again with a row that the second process cannot use in the second update."""
    streams = [IterableDataset.from_generator(stream_rows) for _ in range(2)]
    good, bad = (
        tiny.trainer(folder / name, train_dataset=stream, changes={"max_steps": 2})
        for name, stream in zip(("good", "bad"), streams, strict=True)
    )
    good.train()
    prepare = bad.parts.models.stream.prepare

    def fails(row: Any, place: int) -> Any:
        if place == 31:
            raise DataError("a bad row")
        return prepare(row, place)

    bad.parts.models.stream.prepare = fails
    with pytest.raises(DataError, match="a bad row"):
        bad.train()
    (folder / f"done-{bad.accelerator.process_index}").touch()


def stream_rows() -> Iterator[dict[str, str]]:
    return ({"prompt": f"w{place}"} for place in range(40))


def completions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("two")
    in_two_processes("-m", "tests.ppo.test_loop_in_two_processes", str(place), cwd=ROOT)
    return place


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_what_one_process_requests_is_done_by_both(folder, case):
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert found[list(EXPECTED).index(case)] == EXPECTED[case]


def test_what_reward_functions_log_on_one_process_is_logged_by_both(folder):
    for rank in range(2):
        log = json.loads((folder / f"log-{rank}.json").read_text())
        assert log["rank"] == 0.5 and log["only"] == 5.0
    rows = completions(folder / "logs")
    assert [(row["rank"], row.get("only")) for row in rows] == [(0, None)] * 8 + [(1, "here")] * 8


def test_the_rows_of_a_stream_are_shared_and_a_bad_one_ends_both(folder):
    assert all((folder / f"done-{rank}").exists() for rank in range(2))
    stream = PromptStream(IterableDataset.from_generator(stream_rows), 42, lambda row, place: row)
    assert [row["prompt"] for row in completions(folder / "good")] == [stream[i]["prompt"] for i in range(32)]
    assert len(load_records(folder / "bad")) == 1 and (folder / "bad" / "checkpoint-1").exists()


if __name__ == "__main__":
    program(Path(sys.argv[1]))
