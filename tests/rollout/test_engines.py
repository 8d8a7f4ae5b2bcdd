"""The rollout engine that a configuration describes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny, vllm_module
from tests.processes import single_process
from tests.vllm_server import FakeVLLM, loaded, saved
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, ModelError, RolloutError
from trl_trustkl.parallel.sharding import REPLICATED
from trl_trustkl.rollout import vllm_transfer
from trl_trustkl.rollout.engines import build_engine, corrects, reject_ignored
from trl_trustkl.rollout.transformers_engine import TransformersEngine
from trl_trustkl.rollout.vllm_colocate import ColocatedVLLMEngine
from trl_trustkl.rollout.vllm_server import VLLMServerEngine
from trl_trustkl.run.signals import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore")

OFF = {"vllm_importance_sampling_correction": False}
CORRECTED = SimpleNamespace(vllm_importance_sampling_correction=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def trainer(out: Path, folder: Path, changes: dict[str, Any], **arguments: Any) -> Any:
    return tiny.trainer(out, loaded(folder), changes={"use_vllm": True, **OFF, **changes}, **arguments)


def test_without_vllm_transformers_samples(tmp_path):
    engine = tiny.trainer(tmp_path).parts.rollouts.engine
    assert isinstance(engine, TransformersEngine) and not corrects(CORRECTED, engine)


def test_a_loss_is_corrected_for_any_other_engine_unless_that_is_off():
    assert corrects(CORRECTED, object()) and not corrects(SimpleNamespace(**OFF), object())


def test_a_run_with_a_colocated_vllm(tmp_path, folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    options = {"presence_penalty": 0.5}
    changes = {
        "vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 77, "vllm_model_impl": "transformers",
        "generation_kwargs": options, "temperature": 0.7, "response_length": 5, "stop_token": "eos", "max_steps": 2,
    }  # fmt: skip
    ours = trainer(tmp_path, folder, changes)
    engine = ours.parts.rollouts.engine
    assert isinstance(engine, ColocatedVLLMEngine) and corrects(CORRECTED, engine)
    ours.train()
    (built,) = llm.built
    expected = {
        "gpu_memory_utilization": 0.2,
        "max_model_len": 77,
        "model_impl": "transformers",
        "tensor_parallel_size": 1,
    }
    assert expected.items() <= built.arguments.items() and built.arguments["enable_sleep_mode"] is False
    assert built.calls == ["start", *["reload", "reset", "generate"] * 2, "shutdown"]
    _, parameters = built.asked[0]
    given = {"max_tokens": 5, "temperature": 0.7, "stop_token_ids": [tiny.EOS], "presence_penalty": 0.5}
    assert given.items() <= parameters.items() and len({own["seed"] for _, own in built.asked}) == 8
    assert all(record["sampler"]["kl"] < 1e-8 for record in load_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("vllm_tensor_parallel_size", 2), ("vllm_enable_sleep_mode", True)],
)
def test_a_colocated_vllm_gets_the_settings_of_its_devices(tmp_path, folder, monkeypatch, name, value):
    vllm_module.install(monkeypatch)
    with pytest.raises(ConfigError, match=f"`{name}` got {value}"):
        trainer(tmp_path, folder, {name: value})


def test_a_run_with_a_server(tmp_path, folder):
    with FakeVLLM(folder) as fake:
        host, _, port = fake.url.removeprefix("http://").partition(":")
        changes = {
            "vllm_mode": "server", "vllm_server_host": host, "vllm_server_port": int(port), "vllm_server_timeout": 70,
            "max_steps": 2,
        }  # fmt: skip
        ours = trainer(tmp_path, folder, changes)
        engine = ours.parts.rollouts.engine
        assert isinstance(engine, VLLMServerEngine) and corrects(CORRECTED, engine)
        assert fake.requests == [], "the server was asked before the run"
        ours.train()
        assert fake.loaded == 2 and {body["timeout"] for path, body in fake.requests if path == "/collective_rpc"} == {
            70.0
        }
    assert all(record["sampler"]["kl"] < 1e-8 for record in load_records(tmp_path))


def test_a_server_may_have_an_address_instead_of_host_and_port(tmp_path, folder):
    with FakeVLLM(folder) as fake:
        changes = {"vllm_mode": "server", "vllm_server_base_url": f"{fake.url}/", "max_steps": 1}
        trainer(tmp_path, folder, changes).train()
        assert fake.loaded == 1


def test_from_a_gpu_weights_go_through_the_group_port(tmp_path, folder, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(vllm_transfer, "weights_client", lambda *given: asked.append(given))
    changes = {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 81, "vllm_group_port": 4321}
    processes = single_process()
    processes.device = torch.device("cuda:0")
    engine = build_engine(
        tiny.config(tmp_path, **changes), loaded(folder), None, stop_ids=[], tokenizer=tiny.tokenizer(), processes=processes,
        autocast=nullcontext, stop=StopRequest(1.0), sharding=REPLICATED,
    )  # fmt: skip
    with pytest.raises(RolloutError):
        engine._transfer.send(engine._server, iter(()))
    assert asked == [("http://0.0.0.0:81", 4321, 240.0, torch.device("cuda:0"))]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_model_that_was_not_loaded_from_files_is_an_error(tmp_path, monkeypatch, mode):
    vllm_module.install(monkeypatch)
    with pytest.raises(ModelError, match="`model` got a LlamaForCausalLM that was not loaded from files"):
        tiny.trainer(tmp_path, changes={"use_vllm": True, "vllm_mode": mode})


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_vllm", True), ("generation_kwargs", {"top_k": 3}), ("local_rollout_forward_batch_size", 3)],
)
def test_a_field_that_an_engine_of_the_user_ignores_is_an_error(tmp_path, name, value):
    reject_ignored(tiny.config(tmp_path))
    args = tiny.config(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ConfigError) as error:
        reject_ignored(args)
    assert str(error.value) == (
        f"`{name}` got {value!r} together with the trainer's `rollout_engine`, which ignores it; leave one of them out."
    )


def test_the_users_engine_is_taken_as_it_is(tmp_path):
    mine = TransformersEngine.__new__(TransformersEngine)
    assert tiny.trainer(tmp_path, rollout_engine=mine).parts.rollouts.engine is mine
