"""Operators, casts, synchronisations and bytes of the phases of an update, counted by a dispatch mode without a GPU.

On a GPU every operator that is counted here launches at least one kernel, and a launch takes some 10 to 40 µs of the host's
time, in which a small model's kernel has long finished: an update with fewer operators is a faster one. A synchronisation
makes the host wait until the GPU has done everything it was given.

    operators   operators that compute something: views and allocations are not counted
    casts       those of them that only change the dtype
    syncs       reads of a scalar (`.item()`, `bool(tensor)`, `.tolist()`), and operators whose result's shape depends on
                the data (`nonzero`, indexing with a mask)
    MiB         bytes that the operators write

The shape is that of Qwen3-0.6B with narrow layers: the number of layers, of LoRA modules and of micro-batches determine the
counts, not the width. LoRA on every linear layer, under bf16 autocast on any CPU.

    python benchmarks/operators.py                     # writes benchmarks/data/operators.csv and .md; a minute
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import DATA, byte_tokenizer, distinct_share, random_model, write_csv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYERS = 28
BATCH, LENGTH, EPOCHS = 8, 16, 2
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_KERNEL |= {"_unsafe_view", "is_same_size", "set_", "_nested_tensor_size", "resize_", "expand", "reshape"}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "item", "equal"}


class Counting(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.casts = 0
        self.syncs: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in SYNCS or (name.startswith("index") and _has_mask(args)):
            self.syncs[name] += 1
        if not (func.is_view or name in NO_KERNEL or name in SYNCS):
            self.operators[name] += 1
            self.casts += name == "_to_copy" and args[0].dtype != result.dtype
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result

    def figures(self, divisor: float = 1.0) -> dict[str, float]:
        return {
            "operators": sum(self.operators.values()) / divisor,
            "casts": self.casts / divisor,
            "syncs": sum(self.syncs.values()) / divisor,
            "mib": self.bytes / 2**20 / divisor,
        }


def _has_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def build(folder: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer

    tokenizer = byte_tokenizer()
    model = random_model(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    ).to(torch.bfloat16)  # fmt: skip
    texts = [f"{number:02d} " + "x" * (6 + number) for number in range(BATCH)]
    config = TrustKLPPOConfig(
        output_dir=folder, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2, num_mini_batches=1,
        num_ppo_epochs=EPOCHS, max_steps=2, local_rollout_forward_batch_size=BATCH, response_length=LENGTH,
        temperature=1.0, learning_rate=1e-4, bf16=True, use_cpu=True, gradient_checkpointing=False,
        num_sample_generations=0, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    return TrustKLPPOTrainer(
        args=config, model=model, processing_class=tokenizer, reward_funcs=distinct_share,
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def counted(phases: dict[str, Counting], name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        phases[name] = Counting()  # that of the last update: the first warms up
        with phases[name]:
            return inner(*args, **kwargs)

    return call


def run() -> tuple[list[dict[str, Any]], dict[str, Counting]]:
    """The counts of the second update's phases: of sampling for one token, of the others for one micro-batch and pass."""
    phases: dict[str, Counting] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder)
        for name in ("rollout", "score", "optimise", "measure"):
            setattr(trainer, name, counted(phases, name, getattr(trainer, name)))
        trainer.train()
    micro_batches = 2
    parts = {"rollout": LENGTH, "score": micro_batches, "optimise": EPOCHS * micro_batches, "measure": micro_batches}
    units = {"rollout": "token"} | dict.fromkeys(("score", "optimise", "measure"), "micro-batch")
    rows = [
        {"phase": name, "per": units[name], **{k: round(v, 3) for k, v in phases[name].figures(parts[name]).items()}}
        for name in parts
    ]
    return rows, phases


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| phase | per | operators | casts | syncs | MiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['phase']} | {row['per']} | {row['operators']:,.0f} | {row['casts']:,.0f} | {row['syncs']:.1f} | "
            f"{row['mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--names", type=int, default=0, help="print this many of the most frequent operators of a phase"
    )
    options = parser.parse_args()
    rows, phases = run()
    for name, counting in phases.items() if options.names else ():
        print(name, dict(counting.operators.most_common(options.names)), "syncs", dict(counting.syncs))
    write_csv(DATA / "operators.csv", rows)
    text = table(rows)
    (DATA / "operators.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
