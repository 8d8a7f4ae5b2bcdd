"""The engine that runs vLLM in the training process, with a stand-in for vLLM: its arguments, the order of its calls, failures.

This file is also the program that each of two processes runs.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny, vllm_module
from tests.processes import in_two_processes, single_process
from tests.vllm_server import sampled, saved
from trl_trustkl.errors import ConfigError, ModelError, RolloutError
from trl_trustkl.rollout.vllm_colocate import (
    ColocatedVLLMEngine,
    as_samples,
    check_context,
    finish_reason,
    require_vllm,
)
from trl_trustkl.rollout.vllm_model import VLLMModel
from trl_trustkl.rollout.vllm_options import VLLMSampling
from trl_trustkl.run import rng

PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10])]
SEEDS = tiny.seeds(PROMPTS)
SAMPLING = VLLMSampling(4, 0.8, [2, 24, 25, 26], {})
START = ["start", "reload", "reset"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def engine(
    folder: Path,
    *,
    device: str = "cpu",
    tensor_parallel: int = 1,
    sleeps: bool = False,
    processes: Any = None,
    **about: Any,
) -> ColocatedVLLMEngine:
    model = {"name": str(folder), "dtype": torch.float32, "vocabulary": tiny.VOCAB, "init_kwargs": {}} | about
    processes = single_process() if processes is None else processes
    processes.device = torch.device(device)
    return ColocatedVLLMEngine(
        VLLMModel(**model), SAMPLING, processes, memory=0.25, context=99, tensor_parallel=tensor_parallel, sleeps=sleeps,
        implementation="vllm",
    )  # fmt: skip


def weights(seed: int = 3) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, weight.detach()) for name, weight in tiny.llama(seed).named_parameters())


def expected(seed: int = 3) -> list[tuple[list[int], list[float], str]]:
    model = tiny.llama(seed)
    return [
        sampled(model, ids.tolist(), SAMPLING.parameters(own)) for ids, own in zip(PROMPTS, SEEDS, strict=True)
    ]  # fmt: skip


def as_lists(samples: Any) -> list[Any]:
    return [
        (ids.tolist(), pytest.approx(logps.tolist(), abs=1e-6), why) for ids, logps, why in zip(*samples, strict=True)
    ]


# -- the start ---------------------------------------------------------------------------------------------------------


def test_vllm_is_started_once_with_what_the_policy_needs(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder, init_kwargs={"revision": "main"})
    assert llm.built == [], "vLLM was started before the run"
    part.check()
    part.check()
    (built,) = llm.built
    assert built.arguments == {
        "model": str(folder), "dtype": "float32", "revision": "main", "gpu_memory_utilization": 0.25, "max_model_len": 99,
        "tensor_parallel_size": 1, "enable_sleep_mode": False, "model_impl": "vllm", "distributed_executor_backend": "uni",
        "seed": 0, "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "enforce_eager": True,
        "max_num_batched_tokens": 32768,
    }  # fmt: skip


def test_a_gpu_compiles_and_sleeps_and_its_profiler_gets_fewer_tokens(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder, dtype=torch.bfloat16, device="cuda", sleeps=True)
    part.check()
    given = llm.built[0].arguments
    names = ("dtype", "enable_sleep_mode", "enforce_eager", "max_num_batched_tokens")
    assert [given[name] for name in names] == ["bfloat16", True, False, 4096]


def test_of_quantised_files_only_the_configuration_is_used(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    engine(folder, quantized=True).check()
    engine(folder).check()
    quantised, plain = (built.arguments for built in llm.built)
    assert quantised == plain | {"load_format": "dummy", "hf_overrides": {"quantization_config": None}}


def test_processes_are_numbered_for_vllm_and_seeded_by_group(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    monkeypatch.setattr("torch.distributed.new_subgroups_by_enumeration", lambda groups: (groups, None))
    processes = single_process()
    processes.index, processes.count = 5, 6
    part = engine(folder, processes=processes, tensor_parallel=2)
    part.check()
    given = llm.built[0].arguments
    assert (given["seed"], given["distributed_executor_backend"], given["tensor_parallel_size"]) == (
        2,
        "external_launcher",
        2,
    )
    assert llm.built[0].environment == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "RANK": "5", "WORLD_SIZE": "6"}
    assert part._group == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("fails", [False, True])
def test_the_environment_and_the_random_states_are_as_before_the_start(folder, monkeypatch, fails):
    failing = ("start", ValueError("no memory")) if fails else None
    llm = vllm_module.install(monkeypatch, failing=failing)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delenv("RANK", raising=False)
    processes = single_process()
    processes.count = 2
    random.random(), np.random.rand(), torch.rand(1)
    before = rng.capture(), dict(os.environ)
    part = engine(folder, processes=processes)
    if fails:
        with pytest.raises(ModelError, match=f"vLLM could not load '{folder}' in float32: ValueError: no memory"):
            part.check()
    else:
        part.check()
    assert llm.built[0].environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and llm.built[0].environment["RANK"] == "0"
    assert (rng.capture(), dict(os.environ)) == before


@pytest.mark.parametrize(
    ("changes", "about", "error", "said"),
    [
        ({}, {"vocabulary": 50}, ModelError, "`model` has 50 tokens, and its files in '.*', which vLLM loads, have 43; save"),
        ({"context": 4}, {}, ConfigError, "`vllm_max_model_length` leaves vLLM a context of 4 tokens; it must be more than "
         "response_length, which is 4"),
    ],
)  # fmt: skip
def test_a_model_of_another_shape_is_an_error(folder, monkeypatch, changes, about, error, said):
    vllm_module.install(monkeypatch, **changes)
    with pytest.raises(error, match=said):
        engine(folder, **about).check()


def test_settings_that_cannot_work_are_errors_before_the_start(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    with pytest.raises(
        ConfigError, match="`vllm_tensor_parallel_size` got 2; it must divide the number of processes, 1"
    ):
        engine(folder, tensor_parallel=2)
    with pytest.raises(ConfigError, match="`vllm_enable_sleep_mode` got True on a CPU"):
        engine(folder, sleeps=True)
    assert llm.built == []


def test_without_vllm_the_error_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"`use_vllm` got True, and vLLM cannot be imported \(.*\). Install it: pip install "
                       r"'trl\[vllm\]'"):  # fmt: skip
        engine(folder)


def test_a_vllm_that_cannot_be_imported_is_a_config_error_too(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(
        ConfigError, match="cannot be imported \\(RuntimeError: operator torchvision::nms does not exist\\)"
    ):
        require_vllm()


# -- weights and responses ---------------------------------------------------------------------------------------------


def test_weights_are_loaded_once_for_each_version_in_the_dtype_of_the_trainer(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder, dtype=torch.bfloat16)
    for version, seed in ((0, 3), (0, 4), (1, 5)):
        part.sync(version, weights(seed))
    (built,) = llm.built
    assert built.calls == ["start", *["reload", "reset"] * 2]
    assert all(torch.equal(built.weights[name], weight.bfloat16()) for name, weight in weights(5))


def test_each_response_has_its_seed_and_the_log_probabilities_of_its_tokens(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder)
    part.sync(0, weights())
    assert as_lists(part.generate(PROMPTS, SEEDS)) == expected()
    (built,) = llm.built
    assert built.asked == [
        (ids.tolist(), SAMPLING.parameters(seed)) for ids, seed in zip(PROMPTS, SEEDS, strict=True)
    ] and len({own["seed"] for _, own in built.asked}) == 3  # fmt: skip
    assert as_lists(part.generate(PROMPTS[::-1], SEEDS[::-1])) == expected()[::-1]


def test_vllm_sleeps_between_rollouts_and_wakes_before_it_is_used(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder, device="cuda", sleeps=True)
    part.check()
    for version in (0, 1):
        part.sync(version, weights())
        part.generate(PROMPTS, SEEDS)
    part.generate(PROMPTS, SEEDS)
    rollout = ["generate", ("sleep", 1)]
    assert llm.built[0].calls == [*START, *rollout, "wake", "reload", "reset", *rollout, "wake", *rollout]


def test_a_prompt_that_leaves_no_room_for_the_response_is_named(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch, context=6)
    part = engine(folder)
    part.sync(0, weights())
    with pytest.raises(RolloutError, match="a prompt has 3 tokens; with response_length=4 that is more than vLLM's context of "
                       "6: set vllm_max_model_length higher, shorten the prompt, or lower response_length"):  # fmt: skip
        part.generate(PROMPTS, SEEDS)
    assert llm.built[0].calls == START and len(part.generate(PROMPTS[1:], SEEDS[1:]).ids) == 2
    check_context([], 4, 6, "")
    check_context([[1, 2]], 4, 6, "")


def test_a_response_that_was_aborted_is_an_error_and_a_missing_log_probability_nan(folder, monkeypatch):
    def changed(self: Any, output: Any) -> Any:
        del output.logprobs[0][output.token_ids[0]]
        return output

    vllm_module.install(monkeypatch, changed=changed)
    part = engine(folder)
    part.sync(0, weights())
    found = part.generate(PROMPTS, SEEDS)
    assert all(math.isnan(logps[0]) and bool(logps[1:].isfinite().all()) for logps in found.logps)
    assert finish_reason("stop") == "stop" and finish_reason("length") == "length"
    for other in ("abort", "error", None):
        with pytest.raises(RolloutError, match=f"finish reason {other!r}; it must be 'stop' or 'length'"):
            as_samples([SimpleNamespace(token_ids=[1], logprobs=[{}], finish_reason=other)])


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("EngineDeadError"), KeyboardInterrupt(), ModelError("a layer")])
@pytest.mark.parametrize("method", ["reload", "reset", "generate", "sleep", "wake"])
def test_vllm_is_discarded_after_a_failure_and_started_again(folder, monkeypatch, method, error):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder, device="cuda", sleeps=True)
    part.sync(0, weights())
    llm.failing = (method, error)
    said = "could not load the policy's weights" if method in ("reload", "reset") else "failed while it sampled"
    kind, text = (
        (RolloutError, f"vLLM {said}: RuntimeError: Engine") if isinstance(error, RuntimeError) else (type(error), None)
    )
    with pytest.raises(kind, match=text) as raised:
        if method in ("reload", "reset"):
            part.sync(1, weights())
        else:
            part.generate(PROMPTS, SEEDS)
            part.generate(PROMPTS, SEEDS)
    assert raised.value is error or raised.value.__cause__ is error
    assert llm.built[0].calls[-2:] == [("sleep", 1) if method == "sleep" else method, "shutdown"]
    llm.failing = None
    part.sync(1, weights(4))
    assert as_lists(part.generate(PROMPTS, SEEDS)) == expected(4)
    assert len(llm.built) == 2 and llm.built[1].calls == [*START, "generate", ("sleep", 1)]


def test_weights_that_fail_halfway_are_loaded_from_the_start_the_next_time(folder, monkeypatch):
    llm = vllm_module.install(monkeypatch)
    part = engine(folder)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights())[:3]
        raise ValueError("a bug")

    part.sync(0, weights(4))
    for _ in range(2):
        with pytest.raises(RolloutError, match="could not load the policy's weights: ValueError: a bug"):
            part.sync(1, failing())
    part.sync(1, weights())
    assert len(llm.built) == 3 and as_lists(part.generate(PROMPTS, SEEDS)) == expected()


@pytest.mark.parametrize("count", [1, 2])
def test_vllm_is_stopped_once_and_the_process_group_of_the_training_stays(folder, monkeypatch, count):
    llm = vllm_module.install(monkeypatch)
    processes = single_process()
    processes.count = count
    part = engine(folder, processes=processes)
    part.close()
    assert llm.destroyed == []
    part.check()
    part.close()
    part.close()
    assert llm.built[0].calls == ["start", "shutdown"]
    assert llm.destroyed == ["destroy_model_parallel", "destroy_distributed_environment"][: 3 - count]
    part.sync(0, weights())
    assert len(llm.built) == 2


# -- two processes that share a vLLM -----------------------------------------------------------------------------------


@pytest.mark.processes
def test_two_processes_sample_in_step_and_each_gets_its_own_responses(folder, tmp_path):
    in_two_processes(__file__, str(folder), str(tmp_path), cwd=tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    wanted = [ids for ids, _, _ in expected()]
    assert one["ids"] + other["ids"] == wanted and len(one["ids"]) == 1, "a process got the responses of the other"
    assert one["asked"] == other["asked"] == [ids.tolist() for ids in PROMPTS]
    assert one["scores"] == other["scores"] and len(one["scores"]) == 3, "an evaluation with unequal numbers of batches"


def main(folder: Path, out: Path) -> None:
    """What each process samples of three prompts, of which the first has one; and an evaluation of three prompts."""
    from accelerate import Accelerator

    from trl_trustkl import TrustKLPPOTrainer  # noqa: F401  (TRL looks for vLLM when it is imported)
    from trl_trustkl.parallel.processes import Processes

    with pytest.MonkeyPatch.context() as monkeypatch:
        llm = vllm_module.install(monkeypatch)
        processes = Processes(Accelerator(cpu=True))
        part = engine(folder, processes=processes, tensor_parallel=2)
        part.sync(0, weights())
        mine = slice(0, 1) if processes.index == 0 else slice(1, 3)
        ids = part.generate(PROMPTS[mine], SEEDS[mine]).ids
        asked = [prompt for prompt, _ in llm.built[0].asked]
        part.close()
        changes = {"use_vllm": True, "vllm_tensor_parallel_size": 2, "per_device_eval_batch_size": 1}
        model = vllm_module.loaded(folder)
        trainer = tiny.trainer(out / "run", model, changes=changes, eval_dataset=tiny.prompts(3), peft_config=None)
        scores = [row["score"] for row in trainer.evaluate_completions()]
    found = {"ids": [row.tolist() for row in ids], "asked": asked, "scores": scores}
    (out / f"{processes.index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
