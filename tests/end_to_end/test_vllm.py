"""Runs of SmolLM2-135M whose responses vLLM samples, in the process and on a server.

They are skipped where vLLM is not installed; `make test-vllm` installs it for CPUs and runs them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dense import dense_kl, rollout_logps
from tests.processes import free_port
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.demo.smollm2 import load_smollm2, smollm2_path
from trl_trustkl.errors import ModelError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),
]

LIMIT = 1e-3
KINDS = ("full", "lora", "4-bit lora")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("trl")), "vllm-serve", "--model", smollm2_path(), "--dtype", "float32", "--port",
        str(port), "--host", "127.0.0.1", "--max_model_len", "256", "--enforce_eager", "--max-num-batched-tokens", "4096",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(180):
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        time.sleep(1)
    yield url
    os.killpg(process.pid, 15)
    process.wait(60)


def trainer(folder: Any, kind: str = "lora", *, model: Any = None, **changes: Any) -> TrustKLPPOTrainer:
    path = smollm2_path()
    fields: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_ppo_epochs": 2,
        "gradient_accumulation_steps": 1, "max_steps": 3, "response_length": 8, "trust_max_kl": LIMIT, "seed": 3,
        "learning_rate": 1e-5 if kind == "full" else 1e-3, "report_to": "none", "save_strategy": "no", "use_vllm": True,
        "num_sample_generations": 0, "stop_token": "eos",
    }  # fmt: skip
    if model is None and kind == "4-bit lora":
        model, _ = load_smollm2(quantize=True)
    elif model is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return TrustKLPPOTrainer(
        args=TrustKLPPOConfig(**fields | changes), processing_class=AutoTokenizer.from_pretrained(path), model=model,
        peft_config=None if kind == "full" else adapter,
        reward_funcs=lambda completions, **_: [len(completion) / 50 for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": [f"My day number {n} was" for n in range(16)]}),
    )  # fmt: skip


def of_server(url: str) -> dict[str, Any]:
    return {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 60}


def with_dense_kl(ours: TrustKLPPOTrainer) -> list[float]:
    """The KL(π_old‖π) of each update, in nats per token, from complete passes in float64 before and after it."""
    found: list[float] = []
    before: list[torch.Tensor] = []
    optimise, record = ours.optimise, ours.record

    def optimised(batch: Any) -> Any:
        before[:] = [rollout_logps(ours.model.policy, batch.scored.rollout, ours.args.temperature)]
        return optimise(batch)

    def recorded(batch: Any, stats: Any, measured: Any) -> Any:
        found.append(
            float(
                dense_kl(
                    before[0], rollout_logps(ours.model.policy, batch.scored.rollout, ours.args.temperature)
                ).mean()
            )
        )
        return record(batch, stats, measured)

    ours.optimise, ours.record = optimised, recorded
    return found


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_samples_from_the_policy_and_the_limit_holds(kind, mode, tmp_path, request):
    changes = of_server(request.getfixturevalue("server")) if mode == "server" else {}
    ours = trainer(tmp_path, kind, **changes)
    dense = with_dense_kl(ours)
    ours.train()
    records = load_records(tmp_path)
    assert len(records) == 3
    for record, kl in zip(records, dense, strict=True):
        assert 0 < kl <= LIMIT * (1 + 1e-6) and record["trust"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-8)
        assert record["sampler"]["kl"] < 1e-8, "vLLM sampled from another policy"
        assert record["sampler"]["truncated"] == 0 and abs(record["sampler"]["ratio_max"] - 1) < 1e-3
    assert all(record["trust"]["kl"] > 1e-9 for record in records), "the policy did not move"


def test_both_modes_sample_the_same_tokens_and_a_resumed_run_those_of_one_that_was_not_interrupted(tmp_path, server):
    def completions(folder: Path) -> str:
        return (folder / "completions.jsonl").read_text()

    trainer(tmp_path / "colocate").train()
    trainer(tmp_path / "server", **of_server(server)).train()
    assert completions(tmp_path / "colocate") == completions(tmp_path / "server")
    stopped = trainer(tmp_path / "resumed", save_strategy="steps", save_steps=2)
    stopped.train()
    (tmp_path / "resumed" / "checkpoint-3").rename(tmp_path / "later")
    trainer(tmp_path / "resumed", save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)
    assert completions(tmp_path / "resumed") == completions(tmp_path / "colocate")


def test_in_bf16_the_sampler_differs_a_little_and_the_loss_is_corrected(tmp_path):
    ours = trainer(tmp_path, bf16=True, max_steps=2)
    ours.train()
    for record in load_records(tmp_path):
        assert 1e-6 < record["sampler"]["kl"] < 0.02 and record["sampler"]["truncated"] is not None


def test_files_in_4_bits_are_enough(tmp_path):
    model, tokenizer = load_smollm2(quantize=True)
    model.save_pretrained(tmp_path / "files")
    tokenizer.save_pretrained(tmp_path / "files")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "files")
    ours = trainer(tmp_path / "run", "4-bit lora", model=loaded, max_steps=1)
    ours.train()
    assert load_records(tmp_path / "run")[0]["sampler"]["kl"] < 1e-8


def test_weights_that_are_not_finite_reject_the_update(tmp_path, server):
    for name, changes in (("colocate", {}), ("server", of_server(server))):
        ours = trainer(tmp_path / name, "full", max_steps=1, max_refused=5, **changes)
        ours.parts.rollouts._weights = lambda ours=ours: (
            (n, torch.full_like(p, math.nan)) for n, p in ours.model.policy.named_parameters()
        )
        ours.train()
        (record,) = load_records(tmp_path / name)
        assert "sampler" in record["refused"] and record["trust"]["kl"] == 0


def test_an_evaluation_after_the_run_starts_vllm_again(tmp_path):
    ours = trainer(tmp_path, max_steps=1)
    ours.eval_dataset = Dataset.from_dict({"prompt": ["My evening was", "My night was"]})
    ours.train()
    assert ours.evaluate()["eval_length"] > 0


def test_a_server_of_another_dtype_is_rejected_before_the_first_rollout(tmp_path, server):
    with pytest.raises(
        ModelError, match="computes in torch.float32, and the trainer in bfloat16; start it with --dtype"
    ):
        trainer(tmp_path, bf16=True, **of_server(server)).train()
    assert not (tmp_path / "bounds.jsonl").exists() or not load_records(tmp_path)
