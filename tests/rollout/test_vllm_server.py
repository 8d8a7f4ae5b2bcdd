"""The engine that samples with a vLLM server: what it checks, sends and returns."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.vllm_server import (
    COMPLETIONS,
    LABEL,
    NAMED,
    RELOAD,
    RESET,
    FakeVLLM,
    Fault,
    left_threads,
    loaded,
    sampled,
    saved,
)
from trl_trustkl.errors import ConfigError, ModelError, RolloutError
from trl_trustkl.rollout.vllm_client import VLLMServer
from trl_trustkl.rollout.vllm_model import VLLMModel
from trl_trustkl.rollout.vllm_options import VLLMSampling
from trl_trustkl.rollout.vllm_server import VLLMServerEngine
from trl_trustkl.rollout.vllm_transfer import FileTransfer
from trl_trustkl.run.signals import Overdue, StopRequest

PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10], [8])]
SEEDS = tiny.seeds(PROMPTS)
SAMPLING = VLLMSampling(4, 0.8, [2, *range(24, 27)], {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("parent") / "the-model")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert left_threads() == []


class Recorded(FileTransfer):
    """Keeps the calls, and the weights."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def check(self, server: VLLMServer) -> None:
        self.calls.append("check")

    def send(self, server: VLLMServer, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.calls.append("send")
        self.weights = dict(weights)
        super().send(server, iter(self.weights.items()))

    def close(self) -> None:
        self.calls.append("close")


def engine(
    fake: FakeVLLM,
    folder: Path,
    *,
    sends: bool = True,
    stop: Any = None,
    sampling: VLLMSampling = SAMPLING,
    **about: Any,
) -> VLLMServerEngine:
    model = VLLMModel(
        **{"name": str(folder), "dtype": torch.float32, "vocabulary": tiny.VOCAB, "init_kwargs": {}, **about}
    )
    stop = StopRequest(math.inf) if stop is None else stop
    return VLLMServerEngine(VLLMServer(fake.url, 5, stop), Recorded(), model, sampling, sends=sends, stop=stop)


def weights(seed: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Those of a model that is not the one in the files."""
    yield from ((name, weight.detach()) for name, weight in tiny.llama(seed).named_parameters())


def expected(seed: int = 3) -> list[tuple[list[int], list[float], str]]:
    """The responses of the model with `weights(seed)`."""
    given = [SAMPLING.parameters(each) for each in SEEDS]
    return [sampled(tiny.llama(seed), ids.tolist(), own) for ids, own in zip(PROMPTS, given, strict=True)]


def as_lists(samples: Any) -> list[tuple[list[int], list[float], str]]:
    return [(ids.tolist(), logps.tolist(), why) for ids, logps, why in zip(*samples, strict=True)]


# -- what is checked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "sampling", "error", "said"),
    [
        ({"name": "another/model"}, SAMPLING, ModelError, "`model` got '.*/the-model', and the vLLM server at http.* serves "
         "'another/model'; serve the policy's base model: trl vllm-serve --model .*/the-model"),
        ({"vocabulary": tiny.VOCAB - 1}, SAMPLING, ModelError, "vocabulary is not the policy's, which has 43 tokens; serve"),
        ({"vocabulary": tiny.VOCAB + 1}, SAMPLING, ModelError, "vocabulary is not the policy's, which has 43 tokens; serve"),
        ({"dtype": "torch.bfloat16"}, SAMPLING, ModelError,
         "computes in torch.bfloat16, and the trainer in float32; start it with --dtype float32"),
        ({"logprobs_mode": "raw_logprobs"}, SAMPLING, ConfigError,
         "returns raw_logprobs, .*; start it with --logprobs-mode processed_logprobs"),
        ({"dev_mode": False}, SAMPLING, ConfigError, "takes no weights: it was started without VLLM_SERVER_DEV_MODE=1"),
        ({"max_model_len": 4}, SAMPLING, ConfigError,
         "`response_length` got 4; the vLLM server at http.* has a context of 4 tokens .* larger --max_model_len"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_serve_the_policy_is_an_error_before_the_first_rollout(
    folder, served, sampling, error, said
):
    with FakeVLLM(folder, **served) as fake, pytest.raises(error, match=said):
        engine(fake, folder, sampling=sampling).check()


@pytest.mark.parametrize("name", ["the-model", "/elsewhere/the-model/", "owner/the-model"])
def test_the_same_model_may_be_in_another_place(folder, name):
    with FakeVLLM(folder, name=name) as fake:
        engine(fake, folder).check()
        engine(fake, folder, name=f"{folder}/").check()


def test_dequantised_weights_go_to_a_model_of_any_name(folder):
    with FakeVLLM(folder, name="the-full-model") as fake:
        engine(fake, folder, quantized=True).check()
        with pytest.raises(ModelError):
            engine(fake, folder).check()


def test_the_dtype_may_be_named_without_torch(folder):
    with FakeVLLM(folder, dtype="bfloat16") as fake:
        engine(fake, folder, dtype=torch.bfloat16).check()


def test_only_the_process_that_sends_weights_checks_how(folder):
    with FakeVLLM(folder) as fake:
        for sends in (True, False):
            part = engine(fake, folder, sends=sends)
            part.check()
            assert part._transfer.calls == ["check"] * sends


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_sent_once_for_each_version_and_what_was_computed_before_is_forgotten(folder):
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder)
        part.check()
        names = []
        for version, seed in ((0, 3), (0, 4), (2, 5), (2, 5)):
            part.sync(version, weights(seed))
            names.append(fake.label)
        assert fake.loaded == 2 and names[0] == names[1] != names[2] == names[3]
        sent = [path for path in fake.paths() if path in (RELOAD, RESET, NAMED)]
        assert sent == [RELOAD, RESET, NAMED] * 2
        assert all(torch.equal(part._transfer.weights[name], weight) for name, weight in weights(5))
        assert as_lists(part.generate(PROMPTS, SEEDS)) == [
            (ids, pytest.approx(logps, abs=1e-6), why) for ids, logps, why in expected(5)
        ]


def test_weights_are_sent_in_the_dtype_in_which_the_trainer_computes(folder):
    with FakeVLLM(folder, dtype="torch.bfloat16") as fake:
        part = engine(fake, folder, dtype=torch.bfloat16)
        part.sync(0, weights())
        assert {weight.dtype for weight in part._transfer.weights.values()} == {torch.bfloat16}


def test_a_process_that_does_not_send_reads_no_weights(folder):
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder, sends=False)
        part.sync(0, iter([("read", None)]))  # type: ignore[list-item]
        assert fake.loaded == 0 and as_lists(part.generate(PROMPTS, SEEDS))


@pytest.mark.parametrize("path", [RELOAD, RESET, NAMED])
def test_weights_that_did_not_arrive_are_sent_again(folder, path):
    with FakeVLLM(folder, fault=Fault("500", path, once=True)) as fake:
        part = engine(fake, folder)
        with pytest.raises(RolloutError, match=f"answered {path} with status 500"):
            part.sync(0, weights())
        part.sync(0, weights())
        assert fake.loaded == (1 if path == RELOAD else 2)
        part.sync(0, weights())
        assert fake.loaded == (1 if path == RELOAD else 2)


@pytest.mark.parametrize("version", [0, 1], ids=["the same version", "a new version"])
def test_a_restarted_server_is_checked_and_gets_the_weights_again(folder, caplog, version):
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder)
        part.check()
        part.sync(0, weights())
        part.generate(PROMPTS, SEEDS)
        assert not caplog.records
        fake.restart()
        calls = len(part._transfer.calls)
        part.sync(version, weights())
        (record,) = caplog.records
        assert (
            record.levelno == logging.WARNING and "was restarted, or got weights of another run" in record.getMessage()
        )
        assert part._transfer.calls[calls:] == ["close", "check", "send"], "a connection to the server before was kept"
        found = as_lists(part.generate(PROMPTS, SEEDS))
        assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected()]
        fake.restart()
        fake.config["vllm_config"]["model_config"]["dtype"] = "torch.float16"
        with pytest.raises(ModelError, match="computes in torch.float16"):
            part.sync(version, weights())


def test_two_runs_with_one_server_do_not_take_each_others_weights_for_theirs(folder):
    with FakeVLLM(folder) as fake:
        one, other = engine(fake, folder), engine(fake, folder)
        one.sync(0, weights(3))
        other.sync(0, weights(4))
        with pytest.raises(RolloutError, match="got weights of another run, .* Use a separate server for each run"):
            one.generate(PROMPTS, SEEDS)
        one.sync(0, weights(3))
        assert [ids for ids, _, _ in as_lists(one.generate(PROMPTS, SEEDS))] == [ids for ids, _, _ in expected(3)]


def test_a_version_of_vllm_without_names_for_weights_works(folder, caplog):
    with FakeVLLM(folder, labels=False) as fake:
        for sends in (True, False):
            part = engine(fake, folder, sends=sends)
            part.check()
            for version in (0, 0, 1):
                part.sync(version, weights())
                part.generate(PROMPTS, SEEDS)
        assert fake.loaded == 2 and not caplog.records


def test_sending_ends_where_the_grace_period_of_a_signal_does(folder):
    with FakeVLLM(folder) as fake, StopRequest(0.0) as stop:
        part = engine(fake, folder, stop=stop)
        part.check()

        def interrupted() -> Iterator[tuple[str, Tensor]]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield from weights()

        with pytest.raises(Overdue):
            part.sync(0, interrupted())
        assert fake.loaded == 0


def test_an_evaluation_outside_of_a_run_needs_no_check_before_it(folder):
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder)
        for _ in range(2):
            part.sync(7, weights())
            assert len(as_lists(part.generate(PROMPTS, SEEDS))) == 4
            part.close()
        assert fake.loaded == 2 and part._transfer.calls == ["check", "send", "close"] * 2
        fake.served["id"] = fake.served["root"] = "another"
        with pytest.raises(ModelError):
            part.sync(7, weights())


# -- responses ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(folder: Path) -> Iterator[tuple[FakeVLLM, VLLMServerEngine]]:
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder)
        part.check()
        part.sync(0, weights())
        yield fake, part


def test_a_response_depends_on_its_prompt_and_seed_and_not_on_the_others(ready):
    _, part = ready
    found = as_lists(part.generate(PROMPTS, SEEDS))
    assert [(ids, why) for ids, _, why in found] == [(ids, why) for ids, _, why in expected()]
    assert {why for _, _, why in found} == {"stop", "length"} and found[1] != found[3], (
        "equal prompts got equal responses"
    )
    assert as_lists(part.generate(PROMPTS[::-1], SEEDS[::-1])) == found[::-1]
    assert as_lists(part.generate(PROMPTS[2:3], SEEDS[2:3])) == found[2:3]
    assert [len(part) for part in part.generate([], [])] == [0, 0, 0]


def test_the_log_probabilities_are_those_of_the_distribution_that_is_sampled_from(folder):
    model = loaded(folder)
    with FakeVLLM(folder) as fake:
        part = engine(fake, folder, sampling=VLLMSampling(4, 0.8, [2], {"top_k": 3}))
        part.sync(0, ((name, weight.detach()) for name, weight in model.named_parameters()))
        ids, logps, _ = part.generate(PROMPTS, SEEDS)
    for prompt, response, logp in zip(PROMPTS, ids, logps, strict=True):
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / 0.8
        top = logits.topk(3)
        place = (top.indices == response.unsqueeze(-1)).nonzero()[:, 1]
        assert torch.allclose(top.values.log_softmax(-1)[range(len(response)), place], logp, atol=1e-5)


def test_a_log_probability_of_nan_stays_one(ready):
    fake, part = ready
    for kind in ("nan", "null"):
        fake._counts.clear()
        fake.fault = Fault(kind, at=1, once=True)
        found = part.generate(PROMPTS, SEEDS)
        assert sum(bool(logps.isnan().any()) for logps in found.logps) == 1
        assert list(map(len, found.logps)) == list(map(len, found.ids))


def test_a_prompt_that_leaves_no_room_for_the_response_is_named(folder):
    with FakeVLLM(folder, max_model_len=6) as fake:
        part = engine(fake, folder)
        part.sync(0, weights())
        assert len(part.generate([torch.tensor([5, 6])], [1]).ids) == 1
        with pytest.raises(RolloutError, match="a prompt has 3 tokens; with response_length=4 that is more than vLLM's context "
                           "of 6: start the server with a larger --max_model_len, shorten"):  # fmt: skip
            part.generate(PROMPTS, SEEDS)
        assert fake.paths().count(COMPLETIONS) == 2 + 1


def test_a_server_that_does_not_say_its_context_is_asked_anyway(folder):
    with FakeVLLM(folder) as fake:
        fake.served["max_model_len"] = None
        part = engine(fake, folder)
        part.sync(0, weights())
        assert len(part.generate(PROMPTS, SEEDS).ids) == 4


def test_a_response_that_was_aborted_is_not_taken_for_a_short_one(ready):
    fake, part = ready
    fake._counts.clear()
    fake.fault = Fault("abort", at=2)
    with pytest.raises(
        RolloutError, match="finish reason 'abort'; it must be 'stop' or 'length'. The response is not complete"
    ):
        part.generate(PROMPTS, SEEDS)


@pytest.mark.parametrize("sends", [True, False])
def test_a_restart_while_it_samples_is_an_error(folder, sends):
    """In the process that sent the weights, and in one that did not."""
    with FakeVLLM(folder) as fake:
        main, part = engine(fake, folder), engine(fake, folder, sends=sends)
        main.sync(0, weights())
        part.sync(0, weights())
        fake._counts.clear()
        fake.fault = Fault("restart", at=2)
        with pytest.raises(
            RolloutError, match="was restarted while it sampled.* not the policy's.*resume_from_checkpoint=True"
        ):
            part.generate(PROMPTS, SEEDS)


def test_a_restart_before_the_first_request_of_a_rollout_is_an_error(ready):
    fake, part = ready
    fake.restart()
    with pytest.raises(RolloutError, match="was restarted while it sampled"):
        part.generate(PROMPTS, SEEDS)


def test_the_errors_of_requests_reach_the_caller(ready):
    fake, part = ready
    fake._counts.clear()
    fake.fault = Fault("500", LABEL)
    with pytest.raises(RolloutError, match=f"answered {LABEL} with status 500"):
        part.generate(PROMPTS, SEEDS)
