"""Time and memory of an update without a value (`advantage_estimator` grpo and rloo) against one with GAE.

    python benchmarks/critic_free.py         # writes benchmarks/data/critic_free.csv and .md; about 15 minutes on two cores

The task is the demo's, on SmolLM2-135M with LoRA on a 4-bit backbone: 16 responses for each update, 4 to each prompt in all
kinds, so that they differ only in the estimator. *gae* has the default, a value head on the policy's backbone; *gae, value
model* a separate full-precision model of the same size. Each run is a separate process, and the kinds alternate. The first
update of a run is a warm-up. Memory is the peak resident memory of a run above a bare interpreter with torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import DATA, PHASES, ROOT, lora, machine, peak_bytes, write_csv

KINDS: dict[str, dict[str, Any]] = {
    "gae": {},
    "gae, value model": {},
    "grpo": {"advantage_estimator": "grpo"},
    "rloo": {"advantage_estimator": "rloo", "loss_aggregation": "sequence_sum"},
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train one kind; the seconds of the phases of each update, and the peak memory."""
    import torch  # noqa: F401  # its memory is not that of the run

    bare = peak_bytes()
    from trl_trustkl import load_records

    with tempfile.TemporaryDirectory() as folder:
        trainer_of(options, folder).train()
        seconds = [record["seconds"] for record in load_records(folder)]
    return {"seconds": seconds, "mib": (peak_bytes() - bare) / 2**20}


def trainer_of(options: argparse.Namespace, folder: str) -> Any:
    import torch
    from datasets import Dataset

    from trl_trustkl import BoundReportCallback, TrustKLPPOTrainer
    from trl_trustkl.demo.prompts import TRAIN_PROMPTS
    from trl_trustkl.demo.rewards import sentiment
    from trl_trustkl.demo.smollm2 import load_smollm2
    from trl_trustkl.demo.task import quieten, sentiment_config

    quieten()
    settings = {"max_steps": options.updates + 1, "num_generations": 4, "response_length": options.response_length}
    args = sentiment_config(folder, **settings | KINDS[options.run])
    model, tokenizer = load_smollm2(quantize=True, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    prompts = [[{"role": "user", "content": text}] for text in TRAIN_PROMPTS]
    return TrustKLPPOTrainer(
        args=args, model=model, processing_class=tokenizer, reward_funcs=sentiment, peft_config=lora(),
        value_model=value_model() if options.run == "gae, value model" else None,
        train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[BoundReportCallback(report=False)],
    )  # fmt: skip


def value_model() -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trl_trustkl.demo.smollm2 import smollm2_path

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(smollm2_path(), num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(smollm2_path()).pad_token_id
    return model


def in_a_process(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", kind, "--updates", str(options.updates)]
    command += ["--response-length", str(options.response_length)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run of {kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each run: medians over its updates but the first."""
    rows = []
    for repeat in range(1, options.repeats + 1):
        for kind in options.kinds:
            result = in_a_process(kind, options)
            updates = result["seconds"][1:]
            phases = {phase: round(statistics.median(update[phase] for update in updates), 4) for phase in PHASES}
            rows.append({"kind": kind, "repeat": repeat, **phases, "mib": round(result["mib"], 1)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: medians over the runs of each kind, and update and memory relative to the first kind of the same
    repeat."""
    lines = [
        "| | "
        + " | ".join(f"{phase} (s)" for phase in PHASES)
        + " | update, relative | peak memory (MiB) | relative |",
        "|---" * (len(PHASES) + 4) + "|",
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    for kind, some in by_kind.items():
        middle = {key: statistics.median(row[key] for row in some) for key in (*PHASES, "mib")}
        cells = [f"{middle[phase]:.2f}" for phase in PHASES]
        for key in ("total", "mib"):
            ratios = [row[key] / first[key] for row, first in zip(some, by_kind[kinds[0]], strict=True)]
            cells += [f"{middle['mib']:,.0f}"] if key == "mib" else []
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=5, help="updates of a run after the first (default: %(default)s)"
    )
    parser.add_argument("--response-length", type=int, default=24, help="tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the results (default: %(default)s)")
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options)))
        return
    rows = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "critic_free.csv", rows)
    import torch

    shape = f"16 responses × {options.response_length} tokens, 4 to each prompt, 2 epochs × 2 mini-batches"
    where = machine("cuda" if torch.cuda.is_available() else "cpu")
    runs = f"medians of {options.repeats} runs of {options.updates} updates, without the first update of each run"
    text = f"SmolLM2-135M with LoRA in 4 bits, {shape}; {where}; {runs}.\n\n{table(rows)}\n"
    (options.output / "critic_free.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output}/critic_free.csv and .md")


if __name__ == "__main__":
    main()
