"""TRL's client of a vLLM server, with a stand-in for vLLM: its requests have a time-out, and none is repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from trl.generation import vllm_client

from tests.processes import free_port
from tests.vllm_server import SLACK, FakeVLLM, Fault, saved
from trl_trustkl.trl_compat.vllm import weights_client

DEVICE = torch.device("cuda:0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The devices for which the group of the weights was opened."""
    found: list[Any] = []
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: found.append((self, device)))
    yield found


def test_the_client_is_trls_with_its_group_open(folder, opened):
    with FakeVLLM(folder) as fake:
        client = weights_client(fake.url, 4321, 60.0, DEVICE)
        assert isinstance(client, vllm_client.VLLMClient) and opened == [(client, DEVICE)]
        assert (client.base_url, client.group_port, client.model) == (fake.url, 4321, str(folder))
        assert client._post(f"{fake.url}/reset_prefix_cache", json={}) == {"success": True}


def test_a_server_that_is_not_there_is_not_waited_for():
    started = time.monotonic()
    with pytest.raises(requests.ConnectionError):
        weights_client(f"http://127.0.0.1:{free_port()}", 4321, 60.0, DEVICE)
    assert time.monotonic() - started < SLACK


@pytest.mark.parametrize("path", ["/v1/models", "/server_info", "/update_weights"])
def test_each_request_has_a_time_out(folder, path):
    with FakeVLLM(folder, fault=Fault("stall", path)) as fake:
        started = time.monotonic()
        with pytest.raises(requests.Timeout):
            client = weights_client(fake.url, 4321, 2.0, DEVICE)
            client.session.get(f"{fake.url}/server_info")
            client._post(f"{fake.url}/update_weights", json={})
        assert 1.9 < time.monotonic() - started < 2 + SLACK
        assert fake.paths().count(path) == 1


def test_a_failed_request_is_not_repeated(folder):
    with FakeVLLM(folder, fault=Fault("500", "/update_weights")) as fake:
        client = weights_client(fake.url, 4321, 60.0, DEVICE)
        with pytest.raises(Exception, match="500"):
            client._post(f"{fake.url}/update_weights", json={})
        assert fake.paths().count("/update_weights") == 1


def test_a_request_may_have_another_time_out(folder):
    with FakeVLLM(folder, fault=Fault("stall", "/server_info")) as fake:
        client = weights_client(fake.url, 4321, 60.0, DEVICE)
        with pytest.raises(requests.Timeout):
            client.session.get(f"{fake.url}/server_info", timeout=0.2)
