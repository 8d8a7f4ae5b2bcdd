"""The cost of measuring and recording, as shares of an update's time on the demo's task.

The parts are timed inside one run, instead of comparing the times of different runs. Each part is a share of the time of
one update, from the start of its rollout to the end of its callbacks. Rendering is excluded from that time and reported
separately.

    measure   the batch's pass through the new policy, and enforcement: `seconds.measure` of the record
    exact     the exact KL to the reference and the entropy, in the scoring phase: the difference to the same pass without
              them (log-probabilities only), on the same micro-batches, timed alternately outside the update's time
    record    creating the record
    callback  BoundReportCallback: two files and the table
    render    rendering the report once; not part of the total

The total is measure + exact + record + callback. Settings alternate between runs, so that a temporary slowdown affects all
of them.

    python benchmarks/overhead.py            # writes benchmarks/data/overhead.csv and .md; about 15 minutes on two cores
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import DATA, Clock

PARTS = ("measure", "exact", "record", "callback")
COLUMNS = ("epochs", "measure_fraction", "run", "update", "seconds", *PARTS, "total", "render")


def run(epochs: int, fraction: float, number: int, updates: int) -> list[dict[str, float]]:
    """The rows of one run, without its first update, which is a warm-up."""
    from trl_trustkl import BoundReportCallback, load_records
    from trl_trustkl.demo.task import sentiment_trainer

    clock = Clock()
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        callback = BoundReportCallback(report=True, table=True)
        trainer = sentiment_trainer(
            folder, callbacks=[callback], max_steps=updates + 1, num_ppo_epochs=epochs, measure_fraction=fraction
        )
        clock.wrap(trainer, "record", "record")
        clock.wrap(callback, "on_record", "callback")
        clock.wrap(callback, "render", "render")
        clock.wrap(trainer._loop, "_end_update", "end")
        end_update = trainer._loop._end_update

        def collect(batch: Any, *rest: Any) -> None:
            end_update(batch, *rest)
            taken = clock.take()
            parts.append({name: sum(taken[name]) for name in ("record", "callback", "end")})
            parts[-1]["exact"] = exact_seconds(trainer, batch)

        trainer._loop._end_update = collect
        trainer.train()
        records = load_records(folder)
    rows = []
    for record, seconds in list(zip(records, parts, strict=True))[1:]:
        seconds["measure"] = record["seconds"]["measure"]
        total = record["seconds"]["total"] + seconds["record"] + seconds["end"]
        shares = {name: seconds[name] / total for name in PARTS}
        rows.append(
            {
                "epochs": epochs,
                "measure_fraction": fraction,
                "run": number,
                "update": record["update"],
                "seconds": total,
            }
            | shares
            | {"total": sum(shares.values()), "render": sum(clock.seconds["render"])}
        )
    return rows


def exact_seconds(trainer: Any, batch: Any, repeats: int = 2) -> float:
    """Seconds that the exact KL to the reference and the entropy add to scoring this batch, timed after the update."""
    from trl_trustkl.policy.exact_kl import token_statistics

    with_them, without = [], []
    for _ in range(repeats):
        for seconds, exact in ((with_them, True), (without, False)):
            elapsed = 0.0
            for micro in batch.scored.micro_batches:
                snapshot = trainer.reference.snapshot(micro)
                started = time.perf_counter()
                if exact:
                    trainer.parts.forward.score(micro, snapshot)
                else:
                    with torch.no_grad(), trainer.accelerator.autocast():
                        trainer.model(micro)
                    targets = micro.response_ids[micro.response_mask]
                    with torch.no_grad(), trainer.accelerator.autocast():
                        token_statistics(
                            snapshot.hidden, targets, snapshot.head,
                            vocab_size=trainer.model.split_lm.vocab_size, temperature=trainer.args.temperature,
                        )  # fmt: skip
                elapsed += time.perf_counter() - started
            seconds.append(elapsed)
    return max(0.0, min(with_them) - min(without))


def medians(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row for each setting: the median of each part over its updates."""
    found: dict[tuple[float, float], list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        found[row["epochs"], row["measure_fraction"]].append(row)
    return [
        {name: statistics.median(row[name] for row in group) for name in COLUMNS if name not in ("run", "update")}
        | {"updates": len(group)}
        for _, group in sorted(found.items())
    ]


def table(rows: list[dict[str, float]]) -> str:
    """A Markdown table of shares of an update's time, as medians over updates."""
    head = ["epochs", "measure_fraction", "seconds per update", *PARTS, "total", "updates", "render (s)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in medians(rows):
        shares = [f"{row[name]:.2%}" for name in (*PARTS, "total")]
        cells = [f"{row['epochs']:g}", f"{row['measure_fraction']:g}", f"{row['seconds']:.2f}", *shares]
        lines.append("| " + " | ".join([*cells, f"{row['updates']:g}", f"{row['render']:.1f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--runs", type=int, default=3, help="runs of each setting (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=5, help="updates of each run after the first (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the results (default: %(default)s)")
    options = parser.parse_args()
    rows = []
    for number in range(1, options.runs + 1):
        for epochs, fraction in itertools.product(options.epochs, options.fractions):
            rows += run(epochs, fraction, number, options.updates)
    where = (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "overhead.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: round(value, 6) for name, value in row.items()} for row in rows)
    text = f"Share of an update's time, median over updates; {where}.\n\n{table(rows)}\n"
    (options.output / "overhead.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output}/overhead.csv and .md")


if __name__ == "__main__":
    main()
