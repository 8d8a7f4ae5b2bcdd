"""Common functions of the benchmarks: peak memory, training settings, models with random weights, and the hardware."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]
PHASES = ("generate", "score", "optimise", "measure", "total")


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux). Unlike `ru_maxrss`, it starts at zero in a new process."""
    return _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def used_bytes(device: str) -> int:
    """Memory in use now: resident memory, or what torch has allocated on the GPU."""
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()


def most_bytes(device: str) -> int:
    """The maximum of `used_bytes` so far."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of both TRL's PPOConfig and ours: one mini-batch, and no output except the records."""
    return {
        "output_dir": options.output_dir,
        "per_device_train_batch_size": options.batch_size // 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 1,
        "num_ppo_epochs": options.epochs,
        "total_episodes": options.updates * options.batch_size,
        "local_rollout_forward_batch_size": options.batch_size,
        "response_length": options.response_length,
        "temperature": 1.0,
        "learning_rate": 1e-4,
        "bf16": options.bf16,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": options.gradient_checkpointing,
        "num_sample_generations": 0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def phase_clock(seconds: list[dict[str, float]]) -> Any:
    """A callback that appends the seconds of the phases of every record."""
    from transformers import TrainerCallback

    class Phases(TrainerCallback):
        def on_record(self, args: Any, state: Any, control: Any, *, record: Any, **_: Any) -> None:
            seconds.append(dict(record.seconds))

    return Phases()


class Clock:
    """Seconds of each call of wrapped methods, by name, since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time a method of an object or of a class."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name].append(time.perf_counter() - started)

        setattr(owner, method, timed)

    def take(self) -> dict[str, list[float]]:
        found, self.seconds = self.seconds, defaultdict(list)
        return found


def distinct_share(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """A reward function that takes almost no time, because its cost depends on the user's function."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]


def random_model(**shape: Any) -> Any:
    """A Qwen3 with random weights, which needs no download; `shape` is passed to its configuration."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def byte_tokenizer() -> Any:
    """A tokenizer with 258 tokens (single bytes, <eos> and <pad>), regardless of the model's vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def machine(device: str) -> str:
    """The hardware and software of a measurement: cores and memory, or the GPU; Python and torch."""
    import torch

    host = f"{os.cpu_count()} cores with {instruction_set()}, {memory_gib():.0f} GiB"
    where = host if device == "cpu" else torch.cuda.get_device_name()
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


def instruction_set() -> str:
    """The largest vector instructions of the processor that torch uses, such as AVX512-BF16."""
    import torch

    from trl_trustkl.policy.cpu import computes_bf16

    return torch.backends.cpu.get_cpu_capability() + ("-BF16" if computes_bf16() else "")


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
