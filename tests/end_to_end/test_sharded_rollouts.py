"""Rollouts under sharding: engines get complete weights, and the policy samples with weights that are gathered layer by layer.
A run of two processes samples and trains as one process does.

This file is also the program that each of the two processes runs.
"""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from tests import sharded, tiny
from tests.end_to_end.test_sharded import weights
from tests.processes import ROOT, in_two_processes
from tests.vllm_server import FakeVLLM, loaded, saved
from trl_trustkl import load_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"peft_config": None}}
ROLLOUTS = ("server", "own engine", "layer by layer")


def trained(folder: Path, model: Path, kind: str, rollouts: str, url: str, processes: int) -> Any:
    """Three updates with a vLLM server, the engine of examples/custom_engine.py, or the policy itself."""
    settings = {
        "num_mini_batches": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // processes,
        "learning_rate": 5e-3, "max_steps": 3, "stop_token": "eos", "trust_max_kl": 2e-3, "use_cpu": processes == 1,
    }  # fmt: skip
    arguments = dict(KINDS[kind])
    if rollouts == "own engine":
        engine = runpy.run_path(str(ROOT / "examples" / "custom_engine.py"))["CopyEngine"]
        config = tiny.config(folder, use_cpu=processes == 1)
        arguments["rollout_engine"] = engine(
            tiny.llama(),
            length=config.response_length,
            temperature=config.temperature,
            eos=tiny.tokenizer().eos_token_id,
        )
    elif rollouts == "server":
        settings |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 60.0}
    elif processes > 1:
        settings["ds3_gather_for_generation"] = False
    trainer = tiny.trainer(folder, loaded(model), changes=settings, **arguments)
    if trainer.parts.sharding.shards_weights:
        trainer.add_callback(NothingIsGathered(trainer))
    trainer.train()
    return trainer


class NothingIsGathered(TrainerCallback):
    """Makes it an error to gather all weights during an update."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.parts.sharding.gathered = self._gathered

    def _gathered(self, call: Any) -> None:
        raise AssertionError("all weights were gathered")


def program(folder: Path, model: Path, engine: str, url: str) -> None:
    sharded.on_cpus(engine)
    for kind in KINDS:
        for rollouts in ROLLOUTS:
            run = folder / f"{rollouts}-{kind}"
            found: dict[str, Tensor] = weights(trained(run, model, kind, rollouts, url, 2))
            save_file(found, run / f"{torch.distributed.get_rank()}.safetensors")


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(zero, marks=pytest.mark.slow) for zero in ("zero2", "zero3"))]
)
def test_engines_get_the_weights_of_all_processes(tmp_path: Path, engine: str) -> None:
    sharded.require(engine)
    model = saved(tmp_path / "model")
    with ExitStack() as servers:
        ours, others = (servers.enter_context(FakeVLLM(model)) for _ in range(2))
        in_two_processes(__file__, str(tmp_path), str(model), engine, others.url, cwd=tmp_path)
        for kind in KINDS:
            for rollouts in ROLLOUTS:
                alone = tmp_path / f"alone-{rollouts}-{kind}"
                expected = weights(trained(alone, model, kind, rollouts, ours.url, 1))
                both = tmp_path / f"{rollouts}-{kind}"
                for rank in range(2):
                    found = load_file(both / f"{rank}.safetensors")
                    assert found.keys() == expected.keys()
                    for name, weight in found.items():
                        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)
                for record, other in zip(load_records(both), load_records(alone), strict=True):
                    assert record["score"] == pytest.approx(other["score"], rel=1e-6)
                    assert rollouts == "layer by layer" or record["sampler"]["kl"] < 1e-8
                    assert record["trust"]["kl"] <= 2e-3
                lengths = {len(json.loads(line)["completion"].split()) for line in (both / "completions.jsonl").open()}
                assert len(lengths) > 1, "all responses end at the same token"
        assert ours.loaded == others.loaded == 3 * len(KINDS)


if __name__ == "__main__":
    program(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
