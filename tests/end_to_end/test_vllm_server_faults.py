"""Runs whose vLLM server fails: the error and its time, what is saved, and that the resumed run is the one without the fault.

This file is also the program that tests with separate processes start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.processes import ROOT, free_port, in_two_processes
from tests.survival import without_clock
from tests.vllm_server import COMPLETIONS, LABEL, RELOAD, SLACK, FakeVLLM, Fault, left_threads, loaded, saved
from tests.weights import WatchWeights, same
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, Interrupted, ModelError, RolloutError
from trl_trustkl.rollout.vllm_transfer import FileTransfer
from trl_trustkl.run import checkpoint_folder as checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]

UPDATES, ROWS = 3, 8
TIMEOUT, PATIENT = 3.0, 60.0
"""Seconds until a server that does not answer is an error, and of all other runs."""
CHECK = 2
"""Completions that are asked for before the first rollout, about the vocabulary."""
SECOND = CHECK + ROWS + 3
"""The number of a completion in the middle of the second rollout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread of a request, and no weights in temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert left_threads() == []
    assert list(temporary.glob("trl_trustkl-weights-*")) == []


def build(out: Path, folder: Path, url: str, kind: str = "lora", *, arguments: Any = None, **changes: Any) -> Any:
    settings = {
        "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": PATIENT,
        "max_steps": UPDATES, "learning_rate": 1e-2, "num_ppo_epochs": 1, "stop_token": "eos",
    }  # fmt: skip
    peft = {"peft_config": None} if kind == "full" else {}
    return tiny.trainer(out, loaded(folder), changes=settings | changes, **peft | (arguments or {}))


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def left(out: Path) -> tuple[list[Any], list[str]]:
    """The records without times, and the completions."""
    records = [without_clock(row) for row in load_records(out)] if (out / "bounds.jsonl").exists() else []
    completions = (out / "completions.jsonl").read_text().splitlines() if records else []
    return records, completions


Left = tuple[dict[str, torch.Tensor], list[Any], list[str]]


def whole(out: Path, folder: Path, **changes: Any) -> Left:
    """What a run without a fault leaves."""
    with FakeVLLM(folder) as fake:
        trainer = build(out, folder, fake.url, **changes)
        trainer.train()
    return parameters(trainer), *left(out)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Left:
    return whole(tmp_path_factory.mktemp("healthy"), folder)


def assert_saved(out: Path, updates: int, healthy: Left) -> None:
    """The last complete update is saved, and the records end with it."""
    _, records, completions = healthy
    assert left(out) == (records[:updates], completions[: updates * ROWS])
    names = [path.name for path in out.glob("checkpoint-*")]
    assert names == ([f"checkpoint-{updates}"] if updates else [])
    assert not updates or checkpoint.damage(out / f"checkpoint-{updates}") is None


def assert_resumes(out: Path, folder: Path, healthy: Left, **changes: Any) -> None:
    """With another server, the rest of the run is that of one without a fault, bit for bit."""
    with FakeVLLM(folder) as fake:
        trainer = build(out, folder, fake.url, **changes)
        trainer.train(resume_from_checkpoint=True)
    assert same(parameters(trainer), healthy[0]) and left(out) == healthy[1:]


# -- without a fault ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_server_samples_from_the_policy_after_every_update(tmp_path, folder, monkeypatch, kind):
    def mismatch(out: Path) -> list[float]:
        with FakeVLLM(folder) as fake:
            trainer = build(out, folder, fake.url, kind, trust_max_kl=0.01)
            trainer.train()
        assert any(0 < record["trust"]["scale"] < 1 for record in load_records(out)), "no update was scaled back"
        return [record["sampler"]["kl"] for record in load_records(out)]

    assert all(kl < 1e-8 for kl in mismatch(tmp_path / "sent"))
    send, sent = FileTransfer.send, []

    def once(self: Any, server: Any, weights: Any) -> None:
        if not sent:
            sent.append(1)
            send(self, server, weights)

    monkeypatch.setattr(FileTransfer, "send", once)
    first, *others = mismatch(tmp_path / "stale")
    assert first < 1e-8 and all(kl > 1e-5 for kl in others), "old weights would not be noticed"


# -- before the first rollout ------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(tmp_path, folder):
    trainer = build(tmp_path, folder, f"http://127.0.0.1:{free_port()}", vllm_server_timeout=TIMEOUT)
    started = time.monotonic()
    with pytest.raises(
        RolloutError, match="there is no vLLM server at .*vllm_server_timeout=3 seconds; start one with `trl vllm-"
    ):
        trainer.train()
    assert time.monotonic() - started < TIMEOUT + SLACK and left(tmp_path) == ([], [])


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/server_info", COMPLETIONS])
def test_a_server_that_does_not_answer_at_the_start(tmp_path, folder, path):
    with FakeVLLM(folder, fault=Fault("stall", path)) as fake:
        trainer = build(tmp_path, folder, fake.url, vllm_server_timeout=TIMEOUT)
        with pytest.raises(RolloutError, match=f"has not answered 1 of 1 requests to {path}"):
            trainer.train()
        assert time.monotonic() - (fake.failed or 0) < TIMEOUT + SLACK
    assert_saved(tmp_path, 0, ({}, [], []))


@pytest.mark.parametrize(
    ("served", "error", "said"),
    [
        ({"name": "another/model"}, ModelError, "`model` got .* serves 'another/model'; serve the policy's base model"),
        ({"vocabulary": 50}, ModelError, "vocabulary is not the policy's, which has 43 tokens"),
        ({"dtype": "torch.bfloat16"}, ModelError, "computes in torch.bfloat16, and the trainer in float32"),
        ({"logprobs_mode": "raw_logprobs"}, ConfigError, "returns raw_logprobs"),
        ({"dev_mode": False}, ConfigError, "without VLLM_SERVER_DEV_MODE=1"),
        ({"max_model_len": 6}, ConfigError, "`response_length` got 6; the vLLM server at .* has a context of 6 tokens"),
    ],
)
def test_a_server_of_something_else_is_an_error_before_the_first_rollout(tmp_path, folder, served, error, said):
    with FakeVLLM(folder, **served) as fake:
        with pytest.raises(error, match=said):
            build(tmp_path, folder, fake.url).train()
        assert fake.loaded == 0
    assert_saved(tmp_path, 0, ({}, [], []))


# -- during the run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("stall", at=SECOND), "has not answered . of 8 requests to /v1/completions within 3 seconds"),
        (Fault("die", at=SECOND), "cannot be reached, or ended the connection"),
        (Fault("no choices", at=SECOND), "answered with 0 responses"),
        (Fault("no ids", at=SECOND), "without their token ids"),
        (Fault("abort", at=SECOND), "finish reason 'abort'"),
        (Fault("restart", at=SECOND), "was restarted while it sampled"),
        (Fault("stall", RELOAD, at=1), "has not answered 1 of 1 requests to /collective_rpc"),
        (Fault("die", RELOAD, at=1), "cannot be reached"),
        (Fault("stall", LABEL, at=1), "has not answered 1 of 1 requests to /weight_info"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, Fault) else "",
)
def test_a_server_that_fails_in_the_second_update(tmp_path, folder, healthy, fault, said):
    with FakeVLLM(folder, fault=fault) as fake:
        trainer = build(tmp_path, folder, fake.url, vllm_server_timeout=TIMEOUT if fault.kind == "stall" else PATIENT)
        with pytest.raises(RolloutError, match=said) as error:
            trainer.train()
        assert time.monotonic() - (fake.failed or 0) < TIMEOUT + SLACK
        assert left_threads() == []
        assert fake.url in str(error.value) or "finish reason" in str(error.value)
    assert_saved(tmp_path, 1, healthy)
    assert_resumes(tmp_path, folder, healthy)


def test_a_server_that_is_restarted_before_a_rollout_gets_the_weights_again(tmp_path, folder, healthy, caplog):
    with FakeVLLM(folder, fault=Fault("restart", LABEL, at=1)) as fake:
        trainer = build(tmp_path, folder, fake.url)
        trainer.train()
        assert fake.failed and fake.loaded == UPDATES
    assert ["was restarted" in record.getMessage() for record in caplog.records].count(True) == 1
    assert same(parameters(trainer), healthy[0]) and left(tmp_path) == healthy[1:]


def test_a_prompt_that_leaves_no_room_for_the_response(tmp_path, folder):
    second = build(tmp_path / "none", folder, "http://there").parts.order.rows(1)[5]
    rows = tiny.prompts().to_list()
    rows[second]["prompt"] = "w3 w3 w3 w3 w3 w3 w3 w3 w3"
    arguments = {"arguments": {"train_dataset": Dataset.from_list(rows)}}
    with FakeVLLM(folder, max_model_len=14) as fake, pytest.raises(RolloutError) as error:
        build(tmp_path / "run", folder, fake.url, **arguments).train()
    assert "a prompt has 9 tokens; with response_length=6 that is more than vLLM's context of 14" in str(error.value)
    assert len(load_records(tmp_path / "run")) == 1
    assert_resumes(tmp_path / "run", folder, whole(tmp_path / "whole", folder, **arguments), **arguments)


def test_log_probabilities_of_nan_reject_the_update_and_the_run_goes_on(tmp_path, folder):
    """Those that a server leaves out, and those that it cannot send."""
    for kind in ("null", "nan"):
        with FakeVLLM(folder, fault=Fault(kind, at=SECOND, once=True)) as fake:
            watch = WatchWeights()
            build(tmp_path / kind, folder, fake.url, arguments={"callbacks": [watch]}).train()
        records = load_records(tmp_path / kind)
        assert [record["refused"] is None for record in records] == [True, False, True]
        assert "log-probabilities" in records[1]["refused"] and records[2]["sampler"]["kl"] < 1e-8
        moved = [not same(one, other) for one, other in pairwise(watch.snapshots)]
        assert moved == [True, False, True]


def evaluated() -> dict[str, Any]:
    """Settings with an evaluation after the second update and at the end, of three prompts."""
    return {"eval_strategy": "steps", "eval_steps": 2, "arguments": {"eval_dataset": tiny.prompts(3)}}


def test_a_server_that_dies_in_an_evaluation_leaves_the_update_before_it_saved(tmp_path, folder):
    with FakeVLLM(folder, fault=Fault("die", at=CHECK + 2 * ROWS + 1)) as fake, pytest.raises(RolloutError):
        build(tmp_path / "run", folder, fake.url, **evaluated()).train()
    assert len(load_records(tmp_path / "run")) == 2
    assert_resumes(tmp_path / "run", folder, whole(tmp_path / "whole", folder, **evaluated()), **evaluated())


# -- signals -----------------------------------------------------------------------------------------------------------

GRACE = 0.3


@contextmanager
def interrupted(fake: FakeVLLM, number: int) -> Iterator[None]:
    """Gets a signal when the server stalls, and must end with the grace period, long before the server is an error."""
    fake.on_failure = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Interrupted) as ended:
        yield
    assert ended.value.code == 128 + number
    assert fake.failed is not None and time.monotonic() - fake.failed < GRACE + SLACK
    assert left_threads() == []


@pytest.mark.parametrize(
    ("number", "fault"),
    [(signal.SIGTERM, Fault("stall", at=SECOND)), (signal.SIGINT, Fault("stall", RELOAD, at=1))],
    ids=["responses", "weights"],
)
def test_a_signal_ends_a_run_whose_server_stalls(tmp_path, folder, healthy, fault, number):
    with FakeVLLM(folder, fault=fault) as fake:
        trainer = build(tmp_path, folder, fake.url, grace_seconds=GRACE)
        with interrupted(fake, number):
            trainer.train()
    assert_saved(tmp_path, 1, healthy)
    assert_resumes(tmp_path, folder, healthy)


@pytest.mark.parametrize("path", ["/v1/models", COMPLETIONS])
def test_a_signal_ends_a_run_whose_server_stalls_at_the_start(tmp_path, folder, healthy, path):
    with FakeVLLM(folder, fault=Fault("stall", path)) as fake:
        trainer = build(tmp_path / "new", folder, fake.url, grace_seconds=GRACE)
        with interrupted(fake, signal.SIGTERM):
            trainer.train()
        assert trainer._loop.interrupted == signal.SIGTERM
    assert_saved(tmp_path / "new", 0, healthy)
    with FakeVLLM(folder, fault=Fault("die", at=SECOND)) as fake, pytest.raises(RolloutError):
        build(tmp_path / "old", folder, fake.url).train()
    with FakeVLLM(folder, fault=Fault("stall", path)) as fake:
        trainer = build(tmp_path / "old", folder, fake.url, grace_seconds=GRACE)
        with interrupted(fake, signal.SIGTERM):
            trainer.train(resume_from_checkpoint=True)
    assert_saved(tmp_path / "old", 1, healthy)
    assert_resumes(tmp_path / "old", folder, healthy)


@pytest.mark.parametrize("updates", [2, 3], ids=["within the run", "at its end"])
def test_a_signal_ends_a_run_whose_server_stalls_in_an_evaluation(tmp_path, folder, updates):
    """The update before it is complete, and stays."""
    at = CHECK + updates * ROWS + (3 if updates == 3 else 0) + 1
    with FakeVLLM(folder, fault=Fault("stall", at=at)) as fake:
        trainer = build(tmp_path / "run", folder, fake.url, grace_seconds=GRACE, **evaluated())
        with interrupted(fake, signal.SIGTERM):
            trainer.train()
    assert trainer.state.global_step == len(load_records(tmp_path / "run")) == updates
    assert checkpoint.damage(tmp_path / "run" / f"checkpoint-{updates}") is None
    assert_resumes(tmp_path / "run", folder, whole(tmp_path / "whole", folder, **evaluated()), **evaluated())


def test_an_evaluation_after_an_interrupted_run_is_not_overdue(tmp_path, folder):
    with FakeVLLM(folder, fault=Fault("stall", at=SECOND, once=True)) as fake:
        trainer = build(tmp_path, folder, fake.url, grace_seconds=GRACE, arguments={"eval_dataset": tiny.prompts(3)})
        with interrupted(fake, signal.SIGTERM):
            trainer.train()
        assert trainer.evaluate()["eval_length"] > 0


# -- separate processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_whose_server_stalls_ends_with_its_grace_period(tmp_path, folder, healthy, number):
    """Its threads do not keep it: Python waits for those of pools when it ends."""
    with FakeVLLM(folder, fault=Fault("stall", at=SECOND)) as fake:
        arguments = [str(tmp_path), str(folder), fake.url, str(PATIENT)]
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.test_vllm_server_faults", *arguments],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        fake.on_failure = lambda: child.send_signal(number)
        status = child.wait(120)
        assert status == 128 + number and time.monotonic() - (fake.failed or 0) < GRACE + SLACK
    assert_saved(tmp_path, 1, healthy)
    assert_resumes(tmp_path, folder, healthy)


def test_two_processes_end_together_where_the_weights_of_one_do_not_arrive_and_resume(tmp_path, folder):
    def run(out: Path, fake: FakeVLLM, *words: str) -> None:
        seconds = TIMEOUT if "fails" in words else PATIENT
        in_two_processes(__file__, str(out), str(folder), fake.url, str(seconds), *words, cwd=tmp_path)

    with FakeVLLM(folder) as fake:
        run(tmp_path / "whole", fake)
    with FakeVLLM(folder, fault=Fault("stall", RELOAD, at=1)) as fake:
        run(tmp_path / "run", fake, "fails")
    assert len(load_records(tmp_path / "run")) == 1
    assert checkpoint.damage(tmp_path / "run" / "checkpoint-1") is None
    with FakeVLLM(folder) as fake:
        run(tmp_path / "run", fake, "resumes")
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    for rank in range(2):
        one, other = (torch.load(tmp_path / name / f"{rank}.pt") for name in ("whole", "run"))
        assert same(one, other)


def main(out: Path, folder: Path, url: str, seconds: float, *words: str) -> None:
    trainer = build(out, folder, url, vllm_server_timeout=seconds, grace_seconds=GRACE)
    if "fails" in words:
        with pytest.raises(RolloutError):
            trainer.train()
        return
    trainer.train(resume_from_checkpoint="resumes" in words or None)
    torch.save(parameters(trainer), out / f"{trainer.parts.processes.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), *sys.argv[5:])
