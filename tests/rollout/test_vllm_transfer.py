"""How weights get to a server: by files, and by TRL's client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from tests import tiny
from tests.vllm_server import RELOAD, FakeVLLM, Fault, left_threads, saved
from trl_trustkl.errors import ConfigError, ModelError, RolloutError
from trl_trustkl.rollout import vllm_transfer
from trl_trustkl.rollout.vllm_client import VLLMServer
from trl_trustkl.rollout.vllm_transfer import FileTransfer, NcclTransfer, chunks, transfer_for
from trl_trustkl.run.signals import Overdue

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing may stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == [] and left_threads() == []


def weights(seed: int = 3) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, weight.detach()) for name, weight in tiny.llama(seed).named_parameters())


def test_the_device_decides():
    assert isinstance(transfer_for(torch.device("cpu"), 5), FileTransfer)
    assert isinstance(transfer_for(CUDA, 5), NcclTransfer)


def test_weights_are_gathered_up_to_a_size(monkeypatch):
    monkeypatch.setattr(vllm_transfer, "CHUNK", 16)
    given = [
        ("a", torch.ones(2)),
        ("b", torch.ones(2)),
        ("c", torch.ones(9)),
        ("d", torch.ones(1)),
        ("e", torch.ones(1)),
    ]
    assert [[name for name, _ in chunk] for chunk in chunks(given)] == [["a", "b"], ["c"], ["d", "e"]]
    assert list(chunks([])) == [] and [len(chunk) for chunk in chunks([given[0], given[1]])] == [2]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**29, 5000], ids=["one file", "several"])
def test_a_server_loads_the_weights_from_files(folder, temporary, monkeypatch, size):
    monkeypatch.setattr(vllm_transfer, "CHUNK", size)
    seen: list[Any] = []
    with FakeVLLM(folder) as fake:
        reload = fake._reload

        def watched(body: dict[str, Any]) -> Any:
            place = Path(body["kwargs"]["weights_path"])
            seen.append((place.parent, place.name, len(list(place.iterdir())), body["timeout"]))
            return reload(body)

        monkeypatch.setattr(fake, "_reload", watched)
        server, transfer = VLLMServer(fake.url, 5), FileTransfer()
        transfer.check(server)
        transfer.send(server, weights())
        assert all(torch.equal(fake.model.state_dict()[name], weight) for name, weight in weights())
        transfer.send(server, weights(4))
        assert all(torch.equal(fake.model.state_dict()[name], weight) for name, weight in weights(4))
        transfer.close()
    for place, name, files, seconds in seen:
        assert place == temporary and name.startswith("trl_trustkl-weights-") and seconds == 5
        assert files == 1 if size == 2**29 else files > 3
    assert seen[0][1] != seen[1][1], "two sends used one folder"


def test_weights_that_share_memory_or_are_not_contiguous_are_written(folder):
    tied = dict(weights())
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    tied["model.layers.0.self_attn.q_proj.weight"] = tied["model.layers.0.self_attn.q_proj.weight"].T
    with FakeVLLM(folder) as fake:
        FileTransfer().send(VLLMServer(fake.url, 5), iter(tied.items()))
        assert all(torch.equal(fake.model.state_dict()[name], weight) for name, weight in tied.items())


@pytest.mark.parametrize("kind", ["500", "die", "stall"])
def test_a_server_that_fails_to_load_is_an_error(folder, kind):
    with FakeVLLM(folder, fault=Fault(kind, RELOAD)) as fake, pytest.raises(RolloutError, match=RELOAD):
        FileTransfer().send(VLLMServer(fake.url, 0.4), weights())


@pytest.mark.parametrize("error", [ModelError("a layer"), Overdue(), KeyboardInterrupt(), ValueError("a bug")])
def test_an_error_of_the_weights_stays_what_it_is(folder, error):
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights())[:3]
        raise error

    with FakeVLLM(folder) as fake:
        with pytest.raises(type(error)) as raised:
            FileTransfer().send(VLLMServer(fake.url, 5), failing())
        assert raised.value is error and fake.loaded == 0


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_an_error_that_names_the_folder(folder, temporary, monkeypatch, error):
    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(vllm_transfer, "save_file", full)
    with FakeVLLM(folder) as fake, pytest.raises(RolloutError) as raised:
        FileTransfer().send(VLLMServer(fake.url, 5), weights())
    assert str(raised.value) == (
        f"the weights for the vLLM server could not be written into {temporary}: No space left on device. Make room there, or "
        "set TMPDIR to another folder."
    )


# -- NCCL --------------------------------------------------------------------------------------------------------------


class Client:
    """In the place of TRL's client: keeps what it sends."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.calls: list[Any] = []

    @contextmanager
    def weight_update(self) -> Iterator[None]:
        self.calls.append("start")
        yield
        self.calls.append("finish")

    def update_named_params(self, about: list[Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.calls.append((about, list(tensors)))

    def close_communicator(self) -> None:
        self.calls.append("close")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Client]:
    """The clients that were built."""
    found: list[Client] = []

    def build(*args: Any) -> Client:
        found.append(Client(*args))
        return found[-1]

    monkeypatch.setattr(vllm_transfer, "weights_client", build)
    return found


SERVER = VLLMServer("http://there:8000", 7)


def test_weights_are_announced_and_streamed_in_chunks_with_one_client(built, monkeypatch):
    monkeypatch.setattr(vllm_transfer, "CHUNK", 100)
    given = [
        ("a", torch.ones(2, 30)),
        ("b", torch.ones(3, dtype=torch.bfloat16)),
        ("c", torch.ones(4, dtype=torch.float16)),
    ]
    transfer = NcclTransfer(CUDA, 4321)
    assert built == [], "the group was opened before the server was checked"
    for _ in range(2):
        transfer.send(SERVER, iter(given))
    (client,) = built
    assert client.args == ("http://there:8000", 4321, 7, CUDA)
    once = [
        "start",
        ([("a", "float32", [2, 30])], given[:1]),
        ([("b", "bfloat16", [3]), ("c", "float16", [4])], given[1:]),
        "finish",
    ]
    assert client.calls == once * 2
    transfer.close()
    transfer.close()
    assert client.calls == [*once * 2, "close"]
    transfer.send(SERVER, iter(given))
    assert len(built) == 2


def test_a_client_that_failed_is_closed_and_another_one_built(built):
    transfer = NcclTransfer(CUDA, 4321)
    transfer.send(SERVER, weights())
    built[0].update_named_params = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(
        RolloutError, match="could not be sent to the vLLM server at http://there:8000: ZeroDivisionError"
    ):
        transfer.send(SERVER, weights())
    assert built[0].calls[-1] == "close"
    transfer.send(SERVER, weights())
    assert len(built) == 2 and built[1].calls[-1] == "finish"


@pytest.mark.parametrize("error", [ModelError("a layer"), Overdue(), KeyboardInterrupt()])
def test_other_errors_close_the_client_and_stay_what_they_are(built, error):
    def failing() -> Iterator[tuple[str, Tensor]]:
        raise error
        yield

    transfer = NcclTransfer(CUDA, 4321)
    with pytest.raises(type(error)):
        transfer.send(SERVER, failing())
    assert built[0].calls[-1] == "close"


def test_a_server_needs_a_weight_transfer_and_the_trainer_vllm(folder, monkeypatch):
    transfer = NcclTransfer(CUDA, 4321)
    with FakeVLLM(folder) as fake:
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ConfigError, match="vLLM cannot be imported"):
            transfer.check(VLLMServer(fake.url, 5))
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        with pytest.raises(ConfigError, match=f"{fake.url} has no weight transfer; start it with `trl vllm-serve`"):
            transfer.check(VLLMServer(fake.url, 5))
        fake.config["vllm_config"]["weight_transfer_config"] = {"backend": "nccl"}
        transfer.check(VLLMServer(fake.url, 5))
