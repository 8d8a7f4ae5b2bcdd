"""The four corners of anchor × trust region on a real language model: what fails without each of them.

SmolLM2-135M-Instruct with a 4-bit backbone and LoRA is tuned towards positive sentiment four times from the same start:
with the anchor (β = 0.05) and the clip (0.2), with either, with neither. The table goes into docs/kl_or_trust_region.md.

    python benchmarks/four_corners.py                    # writes benchmarks/data/four_corners.csv and .md

A corner that is finished in --output-dir is not run again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
CORNERS: dict[str, dict[str, Any]] = {
    "anchor + clip": {"kl_coef": 0.05, "clip_rule": "ppo"},
    "clip only": {"kl_coef": 0.0, "clip_rule": "ppo"},
    "anchor only": {"kl_coef": 0.05, "clip_rule": "none"},
    "neither": {"kl_coef": 0.0, "clip_rule": "none"},
}
LAST = 5  # updates that the final figures are means over


def run(folder: Path, updates: int, seed: int, changes: dict[str, Any]) -> None:
    """Train one corner, unless its records are whole."""
    from trl_trustkl import load_records
    from trl_trustkl.cli.task import sentiment_trainer

    if (folder / "bounds.jsonl").exists() and len(load_records(folder)) == updates:
        return
    sentiment_trainer(str(folder), max_steps=updates, seed=seed, max_grad_norm=None, **changes).train()


def summary(folder: Path) -> dict[str, Any]:
    """The corner in numbers, from its records and completions alone."""
    from trl_trustkl import load_records

    records = load_records(folder)
    last = records[-LAST:]
    with open(folder / "completions.jsonl", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["update"] > len(records) - LAST]
    tokens = sum(record["length"] for record in last) * len(rows) / len(last)
    return {
        "score_first": mean(record["score"] for record in records[:LAST]),
        "score_last": mean(record["score"] for record in last),
        "kl_to_reference": mean(record["anchor"]["kl_exact"] for record in last),
        "largest_update_kl": max(record["trust"]["kl"] for record in records),
        "largest_ratio": max(record["trust"]["max_ratio"] for record in records),
        "ref_logp_per_token": sum(row["ref_logp"] for row in rows) / tokens,
        "distinct_2": distinct([row["completion"] for row in rows], 2),
        "sample": " ".join(rows[-1]["completion"].split()),
    }


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def distinct(texts: list[str], n: int) -> float:
    """Share of distinct word n-grams among all of them (Li et al., arXiv 1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def as_markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | score, first → last updates | KL to the reference (nats/response) | largest KL of one update (nats/token) "
        "| largest ratio | reference log-likelihood (nats/token) | distinct-2 | text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        text = row["sample"].replace("|", "\\|")
        lines.append(
            f"| {name} | {row['score_first']:.2f} → {row['score_last']:.2f} | {row['kl_to_reference']:.1f} "
            f"| {row['largest_update_kl']:.2f} | {row['largest_ratio']:,.0f} | {row['ref_logp_per_token']:.2f} "
            f"| {row['distinct_2']:.2f} | {text} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/four_corners"))
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    rows = {}
    for name, changes in CORNERS.items():
        folder = options.output_dir / name.replace(" + ", "_and_").replace(" ", "_")
        run(folder, options.updates, options.seed, changes)
        rows[name] = summary(folder)
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in rows[name].items() if k != "sample"), flush=True)
    DATA.mkdir(exist_ok=True)
    with open(DATA / "four_corners.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["corner", *next(iter(rows.values()))])
        writer.writeheader()
        writer.writerows({"corner": name, **row} for name, row in rows.items())
    (DATA / "four_corners.md").write_text(as_markdown(rows), encoding="utf-8")
    print(f"\n{as_markdown(rows)}\n{options.updates} updates, seed {options.seed}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
