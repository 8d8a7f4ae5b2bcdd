"""Seconds and bytes of an update of SmolLM2-135M by phase, with each sharding engine in two processes and in one process.

    python benchmarks/sharding_cost.py            # benchmarks/data/sharding_cost.csv and .md; about 20 minutes on two cores

One process with two threads, and two processes with one thread each, train on the same batch, in float32. The processes
communicate by gloo through the memory of one machine, so that seconds say little about GPUs; the bytes do not depend on the
machine. Each collective operation counts with the size of the complete tensor that is gathered, reduced or scattered. Seconds
are those of the updates between the first and the last; bytes are those of the last, since counting takes time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`

import torch
from common import DATA, lora, machine, training_settings, write_csv
from torch.utils._python_dispatch import TorchDispatchMode

PHASES = ("generate", "score", "optimise", "measure")
METHODS = {"rollout": "generate", "score": "score", "optimise": "optimise", "measure": "measure", "enforce": "measure"}
ENGINES = ("one process", "ddp", "fsdp2", "zero2", "zero3")
KINDS = ("lora", "full")
RUNS = Path("runs/sharding_cost")


class Bytes(TorchDispatchMode):
    """Counts the bytes of collective operations by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.counts: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            groups = [_bytes(each) for each in args]
            self.counts[self.phase] += max(
                groups, default=0
            )  # inputs and outputs: the complete tensor is the larger one
        return function(*args, **kwargs or {})


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def train(engine: str, kind: str, options: argparse.Namespace) -> None:
    """The run of one process; it writes its seconds and bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import sharded
    from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
    from trl_trustkl.demo.smollm2 import smollm2_path

    if engine in sharded.ENGINES:
        sharded.on_cpus(engine)
    processes = 1 if engine == "one process" else 2
    torch.set_num_threads(2 // processes)
    folder = RUNS / f"{engine}-{kind}".replace(" ", "-")
    settings = training_settings(argparse.Namespace(
        output_dir=str(folder), batch_size=options.batch // processes, epochs=2, updates=options.updates, response_length=16,
        bf16=False, device="cpu", gradient_checkpointing=False,
    ))  # fmt: skip
    settings |= {"use_cpu": engine not in sharded.ENGINES, "max_steps": options.updates, "trust_max_kl": 0.02}
    del settings["total_episodes"]
    from datasets import Dataset

    trainer = TrustKLPPOTrainer(
        args=TrustKLPPOConfig(**settings, stop_token="none"),
        model=AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(smollm2_path()),
        reward_funcs=lambda completion_ids, **_: [len(set(ids)) / len(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [f"My day number {number} was" for number in range(64)]}),
        peft_config=lora() if kind == "lora" else None,
    )  # fmt: skip
    counter = Bytes()
    for method, phase in METHODS.items():
        setattr(trainer, method, _counted(trainer, getattr(trainer, method), counter, phase))
    trainer.train()
    if trainer.is_world_process_zero():
        records = load_records(folder)[1:-1]
        seconds = {
            phase: statistics.median(record["seconds"][phase] for record in records) for phase in (*PHASES, "total")
        }
        megabytes = {phase: counter.counts[phase] / 1e6 for phase in PHASES}
        (folder / "cost.json").write_text(json.dumps({"seconds": seconds, "megabytes": megabytes}))


def _counted(trainer: Any, call: Any, counter: Bytes, phase: str) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.phase = phase
        is_last = trainer.state.global_step + 1 == trainer.args.max_steps
        with counter if is_last else contextlib.nullcontext():
            return call(*args, **kwargs)

    return counted


def cost(engine: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of an engine: a run in as many processes as it has."""
    import subprocess

    from tests.processes import in_two_processes

    folder = RUNS / f"{engine}-{kind}".replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    command = [__file__, "--run", engine, kind, "--updates", str(options.updates), "--batch", str(options.batch)]
    if engine == "one process":
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    else:
        in_two_processes(*command, cwd=Path.cwd())
    found = json.loads((folder / "cost.json").read_text())
    return (
        {"engine": engine, "policy": kind}
        | {f"{phase}_seconds": round(found["seconds"][phase], 2) for phase in (*PHASES, "total")}
        | {f"{phase}_megabytes": round(found["megabytes"][phase], 1) for phase in PHASES}
    )


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    head = ["", "policy", *(f"{phase} (s)" for phase in (*PHASES, "update")), *(f"{phase} (MB)" for phase in PHASES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:,}" if isinstance(v, float) else v for v in row.values()) + " |")
    return "\n".join([
        *lines, "",
        f"SmolLM2-135M, {options.batch} responses × 16 tokens, 2 PPO epochs, float32; {machine('cpu')}; seconds are medians of "
        f"{options.updates - 2} updates, MB are those of one process in one update.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.run:
        train(*options.run, options)
        return
    rows = []
    for kind in options.kinds:
        for engine in options.engines:
            rows.append(cost(engine, kind, options))
            print(rows[-1], flush=True)
            write_csv(DATA / "sharding_cost.csv", rows)
            (DATA / "sharding_cost.md").write_text(markdown(rows, options), encoding="utf-8")


if __name__ == "__main__":
    main()
