"""The cost of `attribution_every` on the demo's task: time as a share of an update's, and the memory of a replay point.

    python benchmarks/attribution.py         # writes benchmarks/data/attribution.csv and .md; about 6 minutes on two cores

The demo's mechanisms are on: the anchor with its controller, the clip, and the limit on the gradient's norm, hence three reruns
of an attributed update. The first update of a run is a warm-up. A run is long enough to have an attributed update.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from common import DATA, machine, write_csv
from torch import Tensor

SETTINGS = {"kl_controller": "adaptive", "kl_coef": 0.02, "kl_target": 6.0, "kl_horizon": 40}


def rows_of_run(every: int, updates: int) -> list[dict[str, Any]]:
    """A row for each update of a run but the first."""
    from trl_trustkl import load_records
    from trl_trustkl.demo.task import sentiment_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = sentiment_trainer(folder, max_steps=updates + 1, attribution_every=every, **SETTINGS)
        optimisation = trainer.parts.optimisation
        held: list[int] = []

        def watched(snapshot: Any = None) -> Any:
            point = type(optimisation).replay_point(optimisation, snapshot)
            held.append(0 if snapshot is not None else sum(each.nbytes for each in tensors(vars(point))))
            return point

        with mock.patch.object(optimisation, "replay_point", watched):
            trainer.train()
        records = load_records(folder)[1:]
    return [
        {
            "every": every,
            "update": record["update"],
            "reruns": sum(kl is not None for kl in (record["counterfactual"] or {}).values()),
            "seconds": round(record["seconds"]["total"] - record["seconds"].get("attribute", 0.0), 4),
            "optimise": round(record["seconds"]["optimise"], 4),
            "measure": round(record["seconds"]["measure"], 4),
            "attribute": round(record["seconds"].get("attribute", 0.0), 4),
            "copy_bytes": max(held, default=0),
        }
        for record in records
    ]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a snapshot holds, not those of the model and the optimizer that it refers to."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in ("parameters", "_optimizer", "_covered", "_groups"):
                yield from tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif type(value).__module__.startswith("trl_trustkl.trust"):
        yield from tensors(vars(value))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: means over the updates of each interval."""
    lines = [
        "| attribution_every | updates | update without it (s) | optimise + measure (s) | a rerun (s) | added on average "
        "| copy (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for every in sorted({row["every"] for row in rows}):
        group = [row for row in rows if row["every"] == every]
        reruns = [row["attribute"] / row["reruns"] for row in group if row["reruns"]]
        seconds = statistics.fmean(row["seconds"] for row in group)
        phases = statistics.fmean(row["optimise"] + row["measure"] for row in group)
        added = statistics.fmean(row["attribute"] for row in group) / seconds
        rerun = f"{statistics.fmean(reruns):.2f}" if reruns else "–"
        copied = f"{group[0]['copy_bytes'] / 2**20:.1f}" if reruns else "0"
        lines.append(f"| {every} | {len(group)} | {seconds:.2f} | {phases:.2f} | {rerun} | {added:.0%} | {copied} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, nargs="+", default=[0, 1, 8])
    parser.add_argument(
        "--updates", type=int, default=2, help="updates of each run after the first, at least (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the results (default: %(default)s)")
    options = parser.parse_args()
    rows = [row for every in options.every for row in rows_of_run(every, max(options.updates, every - 1))]
    write_csv(options.output / "attribution.csv", rows)
    text = f"Means over the updates of one run each; {machine('cpu')}.\n\n{table(rows)}\n"
    (options.output / "attribution.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output}/attribution.csv and .md")


if __name__ == "__main__":
    main()
