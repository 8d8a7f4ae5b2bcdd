"""Requests to a vLLM server that answers, and to one that does not."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.processes import free_port
from tests.vllm_server import COMPLETIONS, RELOAD, SLACK, FakeVLLM, Fault, left_threads, loaded, sampled, saved
from trl_trustkl.errors import ConfigError, RolloutError
from trl_trustkl.rollout import vllm_client
from trl_trustkl.rollout.vllm_client import BadRequest, NotFound, VLLMServer
from trl_trustkl.rollout.vllm_options import VLLMSampling
from trl_trustkl.run.signals import Overdue, StopRequest

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SECONDS, PATIENT = 0.4, 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert left_threads() == []


def parameters(count: int = len(PROMPTS), **options: Any) -> list[dict[str, Any]]:
    sampling = VLLMSampling(4, 0.8, [2], options)
    return [sampling.parameters(seed) for seed in tiny.seeds(range(count))]


def complete(server: VLLMServer, prompts: list[list[int]] = PROMPTS) -> Any:
    server._model = server._model or "model"
    return server.complete(prompts, parameters(len(prompts)))


CALLS: dict[str, Callable[[VLLMServer], Any]] = {
    "/health": VLLMServer.wait_until_ready,
    "/v1/models": VLLMServer.model,
    "/server_info": VLLMServer.config,
    "/reset_prefix_cache": VLLMServer.reset_prefix_cache,
    "/update_weight_version": lambda server: server.label_weights("mine"),
    "/weight_info": VLLMServer.weights_label,
    RELOAD: lambda server: server.post(RELOAD, {"method": "reload_weights"}),
    COMPLETIONS: complete,
}
"""By its path, a call of each request."""
EACH = pytest.mark.parametrize("path", CALLS)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_what_a_server_says_of_its_model(folder):
    with FakeVLLM(folder, max_model_len=99) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.wait_until_ready()
        assert server.model() == {"id": str(folder), "root": str(folder), "max_model_len": 99}
        assert server.config()["model_config"] == {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
        del fake.served["root"], fake.served["max_model_len"]
        assert server.model() == {"id": str(folder), "root": str(folder), "max_model_len": None}


def test_a_token_exists_up_to_the_size_of_the_vocabulary(folder):
    with FakeVLLM(folder, vocabulary=50) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.model()
        assert [server.has_token(token) for token in (0, 42, 49, 50, 1000)] == [True, True, True, False, False]
        fake.served["max_model_len"] = 1
        with pytest.raises(BadRequest, match="maximum context length"):
            server.has_token(0)


def test_each_response_has_a_request_with_its_prompt_and_its_parameters(folder):
    own = parameters(top_k=5)
    with FakeVLLM(folder) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.model()
        found = server.complete(PROMPTS, own)
    asked = {tuple(body["prompt"]): body for path, body in fake.requests if path == COMPLETIONS}
    for prompt, given in zip(PROMPTS, own, strict=True):
        assert asked[tuple(prompt)] == {
            "model": str(folder), "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True, **given
        }  # fmt: skip
    model = loaded(folder)
    for prompt, choice in zip(PROMPTS, found, strict=True):
        ids = choice["token_ids"]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.8
        kept = torch.where(logits >= logits.topk(5).values[:, -1:], logits, -torch.inf).log_softmax(-1)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(kept[range(len(ids)), ids].tolist(), abs=1e-5)


def test_more_prompts_than_requests_at_a_time_are_answered_in_their_order(folder, monkeypatch):
    prompts = [[5 + i, *range(8, 8 + i % 3)] for i in range(9)]
    with FakeVLLM(folder) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.model()
        at_once = server.complete(prompts, parameters(9))
        model = loaded(folder)
        assert [choice["token_ids"] for choice in at_once] == [
            sampled(model, prompt, own)[0] for prompt, own in zip(prompts, parameters(9), strict=True)
        ]
        monkeypatch.setattr(vllm_client, "CONCURRENT", 2)
        assert server.complete(prompts, parameters(9)) == at_once
        assert server.complete(prompts[::-1], parameters(9)[::-1]) == at_once[::-1]
        assert server.complete([], []) == []


def test_weights_have_a_name_that_a_restart_loses_unless_the_version_has_none(folder):
    with FakeVLLM(folder) as fake:
        server = VLLMServer(fake.url, PATIENT)
        assert server.weights_label() == "default"
        server.label_weights("mine")
        assert server.weights_label() == "mine"
        fake.restart()
        assert server.weights_label() == "default"
    with FakeVLLM(folder, labels=False) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.label_weights("mine")
        assert server.weights_label() is None


def test_an_address_may_have_a_path_and_tls(folder):
    with FakeVLLM(folder) as fake:
        with pytest.raises(NotFound, match="answered /v1/models with status 404"):
            VLLMServer(f"{fake.url}/behind/a/proxy", PATIENT).model()
        assert fake.paths() == ["/behind/a/proxy/v1/models"]
        with pytest.raises(RolloutError, match="cannot be reached.*/v1/models: .*SSL"):
            VLLMServer(fake.url.replace("http", "https"), PATIENT).model()


# -- no answers --------------------------------------------------------------------------------------------------------


@EACH
def test_a_server_that_is_not_there(path):
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(
        RolloutError, match=f"{url} cannot be reached.*{path}.*: ConnectionRefusedError.*start it again"
    ):
        CALLS[path](VLLMServer(url, SECONDS))
    assert time.monotonic() - started < SECONDS + SLACK


@pytest.mark.parametrize(
    ("path", "kind"), [*((path, "stall") for path in CALLS), *((path, "trickle") for path in (RELOAD, COMPLETIONS))]
)
def test_a_server_that_does_not_answer_in_time(folder, path, kind):
    with FakeVLLM(folder, fault=Fault(kind, path)) as fake:
        started = time.monotonic()
        seconds = r"0\.\d+" if path == "/health" else SECONDS
        with pytest.raises(
            RolloutError,
            match=f"{fake.url} has not answered . of . requests to {path}.* within {seconds} seconds.*set vllm_server_timeout",
        ):
            CALLS[path](VLLMServer(fake.url, SECONDS))
        assert SECONDS - 0.1 < time.monotonic() - started < SECONDS + SLACK
        assert left_threads() == []


@EACH
def test_a_server_that_dies_while_it_is_asked(folder, path):
    with FakeVLLM(folder, fault=Fault("die", path)) as fake:
        started = time.monotonic()
        with pytest.raises(RolloutError, match=f"{fake.url} cannot be reached, or ended the connection \\({path}.*: "):
            CALLS[path](VLLMServer(fake.url, 1.1 if path == "/health" else PATIENT))
        assert time.monotonic() - started < SLACK


@EACH
@pytest.mark.parametrize(
    ("kind", "said"), [("500", "status 500: 'EngineDeadError'"), ("garbage", "'<html>.* is not JSON")]
)
def test_an_answer_that_is_no_answer_is_quoted(folder, path, kind, said):
    with (
        FakeVLLM(folder, fault=Fault(kind, path)) as fake,
        pytest.raises(RolloutError, match=f"{fake.url} answered {path}.* with {said}"),
    ):
        CALLS[path](VLLMServer(fake.url, SECONDS if path == "/health" else PATIENT))


@pytest.mark.parametrize("path", ["/v1/models", "/server_info", "/weight_info", COMPLETIONS])
def test_an_answer_of_something_else_is_quoted(folder, path):
    with (
        FakeVLLM(folder, fault=Fault("other", path)) as fake,
        pytest.raises(
            RolloutError, match=f"{fake.url} answered {path}.* with {{'a': 1}}, which has no '.*use a version"
        ),
    ):
        CALLS[path](VLLMServer(fake.url, PATIENT))


def test_a_server_without_dev_mode_takes_no_weights(folder):
    with (
        FakeVLLM(folder, dev_mode=False) as fake,
        pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1; start it with"),
    ):
        VLLMServer(fake.url, PATIENT).config()


@pytest.mark.parametrize("kind", ["no choices", "two choices", "no ids"])
def test_a_completion_without_one_response_is_an_error(folder, kind):
    with FakeVLLM(folder, fault=Fault(kind)) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.model()
        count = {"no choices": 0, "two choices": 2, "no ids": 1}[kind]
        with pytest.raises(RolloutError, match=f"answered with {count} responses, or without their token ids"):
            complete(server)


def test_a_response_with_nan_is_none_and_another_rejected_request_an_error(folder):
    with FakeVLLM(folder, fault=Fault("nan", at=1, once=True)) as fake:
        server = VLLMServer(fake.url, PATIENT)
        server.model()
        assert [found is None for found in complete(server)].count(True) == 1
        fake.served["max_model_len"] = 6
        with pytest.raises(BadRequest, match="answered /v1/completions with status 400: .*maximum context length"):
            complete(server)


def test_one_failed_request_ends_the_others_at_once(folder, monkeypatch):
    """Whichever it is: the others do not answer."""
    for failed in range(3):
        with FakeVLLM(folder) as fake:
            server = VLLMServer(fake.url, PATIENT)
            server.model()
            answer = fake.answer

            def first_fails(path: str, body: Any, failed: int = failed, answer: Any = answer, fake: Any = fake) -> Any:
                if body["prompt"] == PROMPTS[failed]:
                    time.sleep(0.2)
                    return 500, "EngineDeadError"
                return None

            monkeypatch.setattr(fake, "answer", first_fails)
            started = time.monotonic()
            with pytest.raises(RolloutError, match="status 500"):
                complete(server)
            assert time.monotonic() - started < SLACK and left_threads() == []


def test_a_connection_that_is_opened_after_the_request_was_given_up_is_closed(folder):
    connections = vllm_client._Connections(5)
    connections.close()
    with FakeVLLM(folder) as fake, pytest.raises(RolloutError, match="ConnectionAbortedError"):
        VLLMServer(fake.url, PATIENT)._exchange("GET", "/health", None, connections)
    assert fake.requests == []


# -- waiting for a server ----------------------------------------------------------------------------------------------


def test_a_server_that_starts_late_is_waited_for(folder):
    port = free_port()
    server = VLLMServer(f"http://127.0.0.1:{port}", PATIENT)
    waiting = threading.Thread(target=server.wait_until_ready)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    with FakeVLLM(folder, port=port):
        waiting.join(PATIENT)
        assert not waiting.is_alive()


def test_the_error_says_how_to_start_one():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RolloutError) as error:
        VLLMServer(url, 1.2).wait_until_ready()
    assert re.search(
        f"there is no vLLM server at {url}, after vllm_server_timeout=1.2 seconds; start one with `trl vllm-serve`, and set "
        "vllm_server_base_url, or vllm_server_host and vllm_server_port, to its address. The last attempt: .*refused",
        str(error.value),
    )


# -- signals -----------------------------------------------------------------------------------------------------------


@EACH
def test_a_signal_ends_a_request_when_its_grace_period_is_over(folder, path):
    with FakeVLLM(folder, fault=Fault("stall", path)) as fake, StopRequest(0.3) as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        with pytest.raises(Overdue):
            CALLS[path](VLLMServer(fake.url, PATIENT, stop))
        assert 0.4 < time.monotonic() - started < 5 + SLACK
        assert left_threads() == []


def test_a_signal_ends_the_wait_for_a_server_at_once():
    with StopRequest(60) as stop:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(Overdue):
            VLLMServer(f"http://127.0.0.1:{free_port()}", PATIENT, stop).wait_until_ready()
        assert time.monotonic() - started < SLACK


def test_a_second_interrupt_ends_a_request_immediately(folder):
    with FakeVLLM(folder, fault=Fault("stall")) as fake, StopRequest(60) as stop:
        for seconds in (0.2, 0.4):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            complete(VLLMServer(fake.url, PATIENT, stop))
        assert time.monotonic() - started < SLACK and left_threads() == []
