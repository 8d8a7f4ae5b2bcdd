"""How an update's time and memory grow with response length, batch, vocabulary and model size.

Qwen3-shaped models with random weights, LoRA on all linear layers, value head on the backbone, two PPO epochs, every response
of full length. One dimension varies at a time, the others stay at the base; each point is a fresh process, whose first
update warms up and is left out. Seconds are those of the records. Two figures of memory: the peak above a bare interpreter
with torch, and `working`, the peak above what was there when training began (libraries, weights, adapters), which is
what updates need. An exponent is the slope of a line fitted to the logarithms, beside it in brackets that between the two
largest values alone, where constant costs weigh least.

    python benchmarks/scaling.py                         # writes benchmarks/data/scaling.csv and .md
    python benchmarks/scaling.py --device cuda           # larger shapes; scaling_cuda.csv and .md
    python benchmarks/scaling.py --quick                 # tiny shapes, to see it work; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from common import (
    DATA,
    PHASES,
    ROOT,
    byte_tokenizer,
    distinct_share,
    lora,
    machine,
    most_bytes,
    phase_clock,
    random_model,
    training_settings,
    used_bytes,
    write_csv,
)

PROMPT_LENGTH = 16
MEASURED = (*PHASES, "mib", "working_mib")


class Point(NamedTuple):
    """tokens of a response, responses of an update, responses of a micro-batch, vocabulary, and the backbone's shape."""

    length: int
    batch: int
    micro_batch: int
    vocabulary: int
    hidden: int
    layers: int


class Plan(NamedTuple):
    """The base, and what each dimension takes on instead."""

    base: Point
    length: tuple[int, ...]
    batch: tuple[int, ...]
    micro_batch: tuple[int, ...]
    vocabulary: tuple[int, ...]
    model: tuple[tuple[int, int], ...]

    def points(self) -> dict[str, list[Point]]:
        """By dimension; the base is in each of them."""
        single = ("length", "batch", "micro_batch", "vocabulary")
        found = {name: [self.base._replace(**{name: value}) for value in getattr(self, name)] for name in single}
        return found | {"model": [self.base._replace(hidden=hidden, layers=layers) for hidden, layers in self.model]}


PLANS = {
    "cpu": Plan(
        base=Point(64, 8, 4, 16_384, 256, 4),
        length=(32, 64, 128, 256),
        batch=(4, 8, 16, 32),
        micro_batch=(1, 2, 4, 8),
        vocabulary=(4_096, 16_384, 65_536, 151_936),
        model=((128, 2), (256, 4), (384, 8), (512, 12)),
    ),
    "cuda": Plan(
        base=Point(256, 32, 8, 65_536, 1024, 16),
        length=(128, 256, 512, 1024),
        batch=(8, 32, 64, 128),
        micro_batch=(4, 8, 16, 32),
        vocabulary=(16_384, 32_768, 65_536, 151_936),
        model=((512, 8), (1024, 16), (1536, 24), (2048, 28)),
    ),
    "quick": Plan(
        base=Point(8, 4, 2, 1024, 64, 2),
        length=(8, 16),
        batch=(4, 8),
        micro_batch=(2, 4),
        vocabulary=(1024, 4096),
        model=((64, 2), (128, 2)),
    ),
}

# True by construction, whatever the figures; see the phases in `trl_trustkl/ppo/trainer.py`.
EXPECTED = {
    "length": "Every pass is linear in the tokens but for attention, which is quadratic; sampling takes one step a token, "
    "and a step reads a cache that grows. That cache and a micro-batch's activations are linear in T, the "
    "chunks of logits bounded.",
    "batch": "At a fixed micro-batch scoring, optimising and measuring take as many passes as there are micro-batches: linear. "
    "Sampling takes the same steps with more rows in each. Memory keeps one micro-batch's activations at a time: with the "
    "batch grow only the stored hidden states and, while sampling, the cache and one step's logits.",
    "micro_batch": "The same tokens in fewer passes: no more arithmetic, and less overhead. The activations of a pass are "
    "linear in its rows.",
    "vocabulary": "The output head and the sums over the vocabulary are linear in V, the layers do not know it. Of memory, the "
    "embedding is linear in V and so are the logits of one sampling step; the chunks of logits are bounded, so there "
    "is no B·T·V term.",
    "model": "x is the number of the layers' parameters. Their arithmetic is linear in it; attention's scores, sampling's "
    "overhead for each layer and the head grow less. Activations grow as width × layers, which is less than parameters.",
}


# -- one point, in a process of its own ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the phases' seconds, MiB, and the number of the layers' parameters."""
    import torch

    point, bare = Point(*options.run), most_bytes(options.device)
    from datasets import Dataset

    from trl_trustkl import BoundReportCallback, TrustKLPPOConfig, TrustKLPPOTrainer

    model = random_model(
        vocab_size=point.vocabulary,
        hidden_size=point.hidden,
        intermediate_size=3 * point.hidden,
        num_hidden_layers=point.layers,
        num_attention_heads=point.hidden // 64,
        num_key_value_heads=max(1, point.hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    if options.device == "cuda":
        model = model.to("cuda", torch.bfloat16)
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    options.batch_size, options.response_length = point.batch, point.length
    options.bf16, options.gradient_checkpointing = options.device == "cuda", False
    shape = {
        "per_device_train_batch_size": point.micro_batch,
        "gradient_accumulation_steps": point.batch // point.micro_batch,
    }
    seconds: list[dict[str, float]] = []
    trainer = TrustKLPPOTrainer(
        args=TrustKLPPOConfig(**training_settings(options) | shape),
        model=model,
        processing_class=byte_tokenizer(),
        reward_funcs=distinct_share,
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(2, 258, (64, PROMPT_LENGTH)).tolist()}),
        peft_config=lora(),
        callbacks=[phase_clock(seconds), BoundReportCallback(report=False)],
    )
    before = used_bytes(options.device)
    trainer.train()
    peak = most_bytes(options.device)
    medians = {phase: statistics.median(update[phase] for update in seconds[1:]) for phase in PHASES}
    return medians | {
        "mib": (peak - bare) / 2**20,
        "working_mib": (peak - before) / 2**20,
        "parameters": parameters,
    }


# -- all of them ---------------------------------------------------------------------------------------------------------


def in_a_process(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", *map(str, point), "--output-dir", folder]
        for name in ("device", "updates", "epochs"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{point} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each dimension and value; the base is measured once."""
    known: dict[Point, dict[str, Any]] = {}
    rows = []
    for dimension, points in PLANS["quick" if options.quick else options.device].points().items():
        for point in points:
            if point not in known:
                known[point] = in_a_process(point, options)
            result = known[point]
            x = result["parameters"] if dimension == "model" else getattr(point, dimension)
            rows.append({"dimension": dimension, "x": x, **point._asdict(), **result})
            figures = "  ".join(f"{name} {result[name]:.2f}" for name in MEASURED)
            print(f"{dimension:11} {x:>10,}  {figures}", flush=True)
    return rows


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through the points' logarithms."""
    import numpy

    x, y = numpy.log(points).T
    return float(numpy.polyfit(x, y, 1)[0])


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The points, the exponents, and what there is to expect of them."""
    units = [name if name in PHASES else f"{name.removesuffix('_mib')} (MiB)" for name in MEASURED]
    units = ["peak (MiB)" if name == "mib (MiB)" else name for name in units]
    by_dimension = {name: [row for row in rows if row["dimension"] == name] for name in EXPECTED}
    lines = ["| | x | " + " | ".join(f"{u} (s)" if u in PHASES else u for u in units) + " |", "|---" * 9 + "|"]
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in PHASES else f"{row[name]:,.0f}" for name in MEASURED]
        lines.append(f"| {row['dimension']} | {row['x']:,} | " + " | ".join(cells) + " |")
    lines += ["", "| exponent of | " + " | ".join(units) + " |", "|---" * 8 + "|"]
    for name, some in by_dimension.items():
        cells = []
        for what in MEASURED:
            points = sorted((row["x"], row[what]) for row in some)
            cells.append(f"{exponent(points):.2f} ({exponent(points[-2:]):.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- *{name}*: {text}" for name, text in EXPECTED.items()), ""]
    base = PLANS["quick" if options.quick else options.device].base
    lines.append(
        f"Base: {base.batch} responses × {base.length} tokens after {PROMPT_LENGTH} of prompt, {base.micro_batch} responses "
        f"in a micro-batch, V = {base.vocabulary:,}, {base.layers} layers of width {base.hidden}; {options.epochs} PPO epochs; "
        f"{'bf16' if options.device == 'cuda' else 'float32'}; {machine(options.device)}; medians of {options.updates - 1} "
        "updates. Exponents over all points (between the two largest)."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--updates", type=int, default=4, help="of each point, the first left out (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written")
    parser.add_argument("--run", type=int, nargs=len(Point._fields), help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.updates < 2:
        parser.error(
            f"--updates got {options.updates}; it must be at least 2: the first update warms up and is left out"
        )
    if options.run:
        print(json.dumps(run(options)))
        return
    rows = measure(options)
    text = summary(rows, options)
    if not options.quick:
        name = "scaling" + ("" if options.device == "cpu" else "_cuda")
        write_csv(DATA / f"{name}.csv", rows)
        (DATA / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
