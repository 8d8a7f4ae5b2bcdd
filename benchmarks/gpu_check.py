"""What an update costs on a GPU, by phase, next to TRL's PPO trainer, and where its time goes.

The policy is a model with random weights in the shape of Qwen3-0.6B with LoRA on every linear layer, or `--model`. An update
has 32 responses of 128 tokens and 2 PPO epochs. The reward takes no time. Settings:

    4-bit                  a backbone in 4 bits, under bf16 autocast
    bf16                   a backbone in bf16, under bf16 autocast
    4-bit, without graph   the same, whose sampling launches every kernel by itself instead of a CUDA graph
    bf16, without graph
    TRL 1.12               its PPO trainer with a 4-bit policy, and a value model and a reward model of its size, in float32,
                           since it cannot sample from such a policy with bf16; in an environment with TRL 1.12

The first update warms up. Seconds are medians of the others but the last, which runs under torch.profiler: kernels launched in
its optimise phase, and the share of this phase's time in which the GPU computes.

    python benchmarks/gpu_check.py                                       # all settings of the installed TRL; some minutes
    python benchmarks/gpu_check.py --settings 4-bit --model Qwen/Qwen2.5-7B --gradient-checkpointing
    python benchmarks/gpu_check.py --settings "TRL 1.12"                 # in an environment with it
    python benchmarks/gpu_check.py --settings bf16 --device cpu --tiny   # whether the script works, without a GPU

Writes benchmarks/data/gpu_check.csv, in which a setting replaces its earlier row, and gpu_check.md.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    DATA,
    PHASES,
    byte_tokenizer,
    distinct_share,
    lora,
    machine,
    phase_clock,
    random_model,
    training_settings,
    write_csv,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vs_stock_ppo import QWEN3_06B, load_tokenizer, policy, prompt_dataset, stock_trainer

STOCK = "TRL 1.12"
WITHOUT = ", without graph"
SETTINGS = ("4-bit", "bf16", f"4-bit{WITHOUT}", f"bf16{WITHOUT}")
TINY = QWEN3_06B | {
    **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
LIMIT = 0.02


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Save the model, unless one is given, and the prompts, which are of one length for a tokenizer of bytes."""
    texts = [f"{number:02d} Please say in a few short sentences what you know about rivers" for number in range(64)]
    options.prompts = str(folder / "prompts.json")
    Path(options.prompts).write_text(json.dumps(texts), encoding="utf-8")
    if options.model is None:
        options.model = str(folder / "model")
        with torch.device(options.device):
            model = random_model(**(TINY if options.tiny else QWEN3_06B)).to(torch.bfloat16)
        model.save_pretrained(options.model)
        byte_tokenizer().save_pretrained(options.model)


def our_trainer(options: argparse.Namespace, setting: str, seconds: list[dict[str, float]]) -> Any:
    from transformers import AutoModelForCausalLM

    from trl_trustkl import BoundReportCallback, TrustKLPPOConfig, TrustKLPPOTrainer

    plain = {"cache_implementation": "static", "disable_compile": True}
    changes = {"generation_kwargs": plain} if setting.endswith(WITHOUT) else {}
    placed: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0} if options.device == "cuda" else None}
    return TrustKLPPOTrainer(
        args=TrustKLPPOConfig(**training_settings(options), trust_max_kl=LIMIT, **changes),
        model=policy(options) if setting.startswith("4-bit") else AutoModelForCausalLM.from_pretrained(options.model, **placed),
        processing_class=load_tokenizer(options), reward_funcs=distinct_share, peft_config=lora(),
        train_dataset=prompt_dataset(options),
        callbacks=[phase_clock(seconds), BoundReportCallback(report=False, table=False)],
    )  # fmt: skip


class Profiled:
    """Wraps the optimise phase of a trainer, and profiles it in the last update."""

    def __init__(self, trainer: Any, options: argparse.Namespace) -> None:
        self.kernels, self.kernel_seconds = 0, 0.0
        self._cuda, self._left, self._inner = options.device == "cuda", options.updates, trainer.optimise
        trainer.optimise = self

    def __call__(self, batch: Any) -> Any:
        self._left -= 1
        if self._left:
            return self._inner(batch)
        with profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]) as profiler:
            result = self._inner(batch)
            if self._cuda:
                torch.cuda.synchronize()
        where = DeviceType.CUDA if self._cuda else DeviceType.CPU
        rows = [row for row in profiler.key_averages() if row.device_type == where]
        self.kernels = sum(row.count for row in rows)
        micros = (row.self_device_time_total if self._cuda else row.self_cpu_time_total for row in rows)
        self.kernel_seconds = sum(micros) / 1e6
        return result


def measure(options: argparse.Namespace, setting: str, folder: Path) -> dict[str, Any]:
    """The row of a setting."""
    options = argparse.Namespace(**vars(options) | {"output_dir": str(folder), "bf16": setting != STOCK})
    seconds: list[dict[str, float]] = []
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if setting == STOCK:
        stock_trainer(options, seconds).train()
        kernels, busy, kl = "", "", ""
    else:
        from trl_trustkl import load_records

        trainer = our_trainer(options, setting, seconds)
        profiled = Profiled(trainer, options)
        trainer.train()
        median = statistics.median(each["optimise"] for each in seconds[1:-1])
        kernels, busy = str(profiled.kernels), f"{profiled.kernel_seconds / median:.3f}"
        kl = f"{max(record['trust']['kl'] for record in load_records(folder)):.6f}"
    phases = {name: f"{statistics.median(each[name] for each in seconds[1:-1]):.4f}" for name in PHASES}
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if options.device == "cuda" else "0"
    return {
        "setting": setting, **phases, "kernels": kernels, "busy": busy, "gib": gib, "kl": kl,
        "updates": len(seconds), "machine": machine(options.device),
    }  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| | generate (s) | score (s) | optimise (s) | measure (s) | update (s) | kernels of optimise | GPU busy in optimise "
        "| peak memory (GiB) | largest KL(π_old‖π) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["setting"], *(f"{float(row[name]):.2f}" for name in PHASES)]
        cells += [f"{int(row['kernels']):,}", f"{float(row['busy']):.0%}"] if row["kernels"] else ["", ""]
        cells += [f"{float(row['gib']):.1f}", f"{float(row['kl']):.2g}" if row["kl"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    where = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return "\n".join([*lines, "", f"{where}; limit `trust_max_kl={LIMIT:g}` nats per token."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, STOCK], default=list(SETTINGS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="name or folder of a model (default: random weights)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch")
    parser.add_argument("--updates", type=int, default=5, help="at least 3 (%(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of gpu_check.csv and .md (%(default)s)")
    options = parser.parse_args()
    if options.updates < 3:
        parser.error("--updates must be at least 3: the first warms up, the last is profiled")
    options.epochs, options.batch_size, options.response_length = 2, *((4, 4) if options.tiny else (32, 128))
    file = options.data / "gpu_check.csv"
    rows: dict[str, dict[str, Any]] = {}
    if file.exists():
        with open(file, encoding="utf-8", newline="") as opened:
            rows = {row["setting"]: row for row in csv.DictReader(opened)}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        for setting in options.settings:
            rows[setting] = measure(options, setting, Path(folder) / setting)
            print(rows[setting], flush=True)
            gc.collect()
            write_csv(file, list(rows.values()))
            (options.data / "gpu_check.md").write_text(table(list(rows.values())), encoding="utf-8")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
