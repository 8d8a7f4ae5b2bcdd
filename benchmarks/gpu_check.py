"""What an update costs on a GPU, by phase: seconds, kernels, the share of the time in which the GPU computes, peak memory.

The policy is a model with random weights in the shape of Qwen3-0.6B with LoRA on every linear layer, or `--model`. An update
has 32 responses of 128 tokens and 2 PPO epochs, under bf16 autocast. The reward takes no time. The hard limit `trust_max_kl` is
on, and the largest KL(π_old‖π) of the updates is printed next to it.

    seconds   of the phase, median over the updates but the first, which warms up
    kernels   launched in the phase of the last update, which runs under torch.profiler
    busy      time of these kernels / seconds of the phase without the profiler: what is missing to 1 is waiting for the host
    GiB       the most that torch had allocated by the end of the phase

    python benchmarks/gpu_check.py                        # writes benchmarks/data/gpu_check.csv and .md; some minutes
    python benchmarks/gpu_check.py --four-bit             # a backbone in 4 bits
    python benchmarks/gpu_check.py --static-cache         # compiled decoding, which transformers captures in a CUDA graph
    python benchmarks/gpu_check.py --device cpu --tiny    # whether the script works, without a GPU
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from common import DATA, byte_tokenizer, distinct_share, lora, machine, random_model, write_csv
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vs_stock_ppo import QWEN3_06B

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records

PHASES = ("rollout", "score", "optimise", "measure")
TINY = QWEN3_06B | {
    **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
LIMIT = 0.02


def seconds_now(device: str) -> float:
    """When the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer; a random model is quantised by saving it and loading it again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    placed: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0} if options.device == "cuda" else None}
    if options.four_bit:
        placed["quantization_config"] = four_bit
    if options.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(options.model, **placed), tokenizer
    model = random_model(**(TINY if options.tiny else QWEN3_06B)).to(torch.bfloat16)
    if not options.four_bit:
        return model.to(options.device), byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **placed), byte_tokenizer()


def build(options: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset

    batch, length = (4, 4) if options.tiny else (32, 128)
    model, tokenizer = load(options)
    texts = [f"{number:02d} Please say in a few short sentences what you know about rivers" for number in range(batch)]
    config = TrustKLPPOConfig(
        output_dir=folder, per_device_train_batch_size=batch // 2, gradient_accumulation_steps=2, num_mini_batches=1,
        num_ppo_epochs=2, max_steps=options.updates, local_rollout_forward_batch_size=batch, response_length=length,
        temperature=1.0, learning_rate=1e-4, bf16=True, use_cpu=options.device == "cpu", trust_max_kl=LIMIT,
        gradient_checkpointing=options.gradient_checkpointing, num_sample_generations=0, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0,
        generation_kwargs={"cache_implementation": "static"} if options.static_cache else None,
    )  # fmt: skip
    return TrustKLPPOTrainer(
        args=config, model=model, processing_class=tokenizer, reward_funcs=distinct_share, peft_config=lora(),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
    )  # fmt: skip


class Phases:
    """Wraps the phases of a trainer: clocks those of all updates, and profiles those of the last one."""

    def __init__(self, trainer: Any, device: str, updates: int) -> None:
        self.seconds: dict[str, Counter[int]] = defaultdict(Counter)
        self.kernels: Counter[str] = Counter()
        self.kernel_seconds: Counter[str] = Counter()
        self.gib: dict[str, float] = {}
        self._device, self._updates, self._update = device, updates, 0
        for name in PHASES:
            setattr(trainer, name, self._wrapped(name, getattr(trainer, name)))

    def _wrapped(self, name: str, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._update += name == "rollout"
            if self._update == self._updates:
                return self._profiled(name, lambda: inner(*args, **kwargs))
            started = seconds_now(self._device)
            result = inner(*args, **kwargs)
            self.seconds[name][self._update] += seconds_now(self._device) - started  # `enforce` measures again
            if self._device == "cuda":
                self.gib[name] = torch.cuda.max_memory_allocated() / 2**30
            return result

        return call

    def _profiled(self, name: str, call: Any) -> Any:
        where = DeviceType.CUDA if self._device == "cuda" else DeviceType.CPU
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device == "cuda" else [])
        with profile(activities=activities) as profiler:
            result = call()
            seconds_now(self._device)
        rows = [row for row in profiler.key_averages() if row.device_type == where]
        times = [row.self_device_time_total if self._device == "cuda" else row.self_cpu_time_total for row in rows]
        self.kernels[name] += sum(row.count for row in rows)
        self.kernel_seconds[name] += sum(times) / 1e6
        return result

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for name in PHASES:
            seconds = statistics.median(self.seconds[name][update] for update in range(2, self._updates))
            busy, gib = round(self.kernel_seconds[name] / seconds, 3), round(self.gib.get(name, 0.0), 2)
            found.append(
                {"phase": name, "seconds": round(seconds, 4), "kernels": self.kernels[name], "busy": busy, "gib": gib}
            )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="name or folder of a model (default: random weights)")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch")
    parser.add_argument("--updates", type=int, default=5, help="at least 3 (%(default)s)")
    options = parser.parse_args()
    if options.updates < 3:
        parser.error("--updates must be at least 3: the first warms up, the last is profiled")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, folder)
        phases = Phases(trainer, options.device, options.updates)
        trainer.train()
        kls = [record["trust"]["kl"] for record in load_records(folder)]
    rows = phases.rows()
    lines = ["| phase | seconds | kernels | busy | GiB |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['phase']} | {r['seconds']:.3f} | {r['kernels']:,} | {r['busy']:.0%} | {r['gib']:.1f} |" for r in rows
    ]
    switches = [name for name in ("four_bit", "static_cache", "gradient_checkpointing") if getattr(options, name)]
    what = ", ".join([options.model or "random weights in the shape of Qwen3-0.6B", *switches])
    bound = f"largest KL(π_old‖π) of {len(kls)} updates {max(kls):.3g} nats per token, limit {LIMIT:g}"
    lines += ["", f"{what}; {machine(options.device)}; {bound}."]
    text = "\n".join(lines) + "\n"
    if not options.tiny:
        write_csv(DATA / "gpu_check.csv", rows)
        (DATA / "gpu_check.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
