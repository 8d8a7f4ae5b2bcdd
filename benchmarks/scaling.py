"""How an update's time and memory grow with response length, batch, vocabulary and model size.

The models have the shape of Qwen3 and random weights, LoRA on all linear layers, and a value head on the backbone; an
update has two PPO epochs, and every response has full length. One dimension varies at a time, and the others have the base
values. Each point is a separate process, whose first update is a warm-up and not counted. Seconds are those of the records.
Memory is reported twice: `peak`, above a bare interpreter with torch, and `working`, above the memory at the start of
training (libraries, weights, adapters), which is what updates need. An exponent is the slope of a line fitted to the
logarithms; in brackets, the slope between the two largest values only, where constant costs have the least influence.

    python benchmarks/scaling.py                         # writes benchmarks/data/scaling.csv and .md
    python benchmarks/scaling.py --device cuda           # larger shapes; scaling_cuda.csv and .md
    python benchmarks/scaling.py --quick                 # tiny shapes, to test the script; writes nothing
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
    """Tokens per response, responses per update, responses per micro-batch, vocabulary size, and the backbone's shape."""

    length: int
    batch: int
    micro_batch: int
    vocabulary: int
    hidden: int
    layers: int


class Plan(NamedTuple):
    """The base point, and the values of each dimension."""

    base: Point
    length: tuple[int, ...]
    batch: tuple[int, ...]
    micro_batch: tuple[int, ...]
    vocabulary: tuple[int, ...]
    model: tuple[tuple[int, int], ...]

    def points(self) -> dict[str, list[Point]]:
        """The points of each dimension, which include the base."""
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

# These follow from the algorithm, not from the measurements; see the phases in `trl_trustkl/ppo/trainer.py`.
EXPECTED = {
    "length": "Every pass is linear in the number of tokens, except attention, which is quadratic. Sampling makes one step "
    "per token, and each step reads a growing cache. The cache and the activations of a micro-batch are linear in T; the "
    "chunks of logits are bounded.",
    "batch": "With a fixed micro-batch, scoring, optimising and measuring make one pass per micro-batch, so their time is "
    "linear. Sampling makes the same number of steps with more rows in each. Memory holds the activations of one micro-batch "
    "at a time; only the stored hidden states and, while sampling, the cache and the logits of one step grow with the batch.",
    "micro_batch": "The same tokens are computed in fewer passes, with the same arithmetic and less overhead. The activations "
    "of a pass are linear in its rows.",
    "vocabulary": "The output head and the sums over the vocabulary are linear in V; the layers do not depend on V. In memory, "
    "the embedding and the logits of one sampling step are linear in V; the chunks of logits are bounded, so there is no "
    "B·T·V term.",
    "model": "x is the number of parameters of the layers. Their arithmetic is linear in x; the attention scores, the sampling "
    "overhead of each layer and the head grow less. Activations grow with width × layers, which is less than the parameters.",
}


# -- one point, in a separate process ----------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the phases' seconds, MiB, and the number of parameters of the layers."""
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


# -- all points ----------------------------------------------------------------------------------------------------------


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
    """One row for each dimension and value. The base is measured only once."""
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
    """The tables of points and exponents, and the expected growth."""
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
        f"Base: {base.batch} responses × {base.length} tokens after {PROMPT_LENGTH} tokens of prompt, {base.micro_batch} "
        f"responses per micro-batch, V = {base.vocabulary:,}, {base.layers} layers of width {base.hidden}; {options.epochs} "
        f"PPO epochs; {'bf16' if options.device == 'cuda' else 'float32'}; {machine(options.device)}; medians of "
        f"{options.updates - 1} updates. Exponents are over all points (in brackets: between the two largest)."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--updates", type=int, default=4, help="updates per point; the first is not counted (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="use tiny shapes, and write nothing")
    parser.add_argument("--run", type=int, nargs=len(Point._fields), help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.updates < 2:
        parser.error(
            f"--updates got {options.updates}; it must be at least 2: the first update is a warm-up and not counted"
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
