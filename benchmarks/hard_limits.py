"""Hard limits and estimators of the advantage on a real language model: what each limit costs, and which one decides.

SmolLM2-135M-Instruct with a 4-bit backbone and LoRA is trained with a reward for positive sentiment.
Three comparisons, each with several seeds:

    anchor      a limit on the KL to the reference, against a penalty that a controller holds at the same KL, and both together
    estimators  GAE, GRPO and RLOO, each with and without hard limits on the mean, the tokens and the responses
    tokens      limits on the largest KL of a token: which share of the updates is certified, and what the score does

    python benchmarks/hard_limits.py    # benchmarks/data/hard_limits.csv and .md

Each comparison is a run of `trustkl compare`, so that the same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import DATA, machine, write_csv

from trl_trustkl.certificate import is_certified
from trl_trustkl.cli import main as trustkl
from trl_trustkl.compare.metrics import of_run, spread
from trl_trustkl.compare.settings import slug
from trl_trustkl.records import BoundRecord
from trl_trustkl.report import read_run
from trl_trustkl.report.series import column, largest
from trl_trustkl.report.text import number, percent

KL = 3.0
"""Nats per response: the limit of the anchor, and the target of the penalty that it is compared with."""
LIMITS = {"trust_max_kl": 0.02, "trust_max_kl_token": 0.5, "trust_max_kl_response": 1.0}
COMMON = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 1,
    "response_length": 16,
    "learning_rate": 2e-3,
}
GROUPS = {"num_generations": 4}
PENALTY = {"kl_controller": "dual", "kl_controller_kwargs": {"lr": 0.3}, "kl_coef": 0.05}
WITHOUT_PENALTY = {"kl_coef": 0.0}


def with_and_without(name: str, fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: fields, f"{name}, limits": fields | LIMITS}


UPDATES = {"anchor": 12, "estimators": 8, "tokens": 8}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "anchor": {
        "penalty, target 3": PENALTY | {"kl_target": KL},
        "stronger penalty, target 3": PENALTY | {"kl_coef": 0.3, "kl_target": KL},
        "penalty 0.3": {"kl_coef": 0.3},
        "penalty 1": {"kl_coef": 1.0},
        "limit 3": WITHOUT_PENALTY | {"anchor_max_kl": KL},
        "limit 3, penalty, target 2": PENALTY | {"kl_target": 2.0, "anchor_max_kl": KL},
        "neither": WITHOUT_PENALTY,
    },
    "estimators": {
        **with_and_without("gae", {}),
        **with_and_without("grpo", {"advantage_estimator": "grpo", **GROUPS}),
        **with_and_without("rloo", {"advantage_estimator": "rloo", **GROUPS}),
    },
    "tokens": {f"token limit {limit:g}": {"trust_max_kl_token": limit} for limit in (0.1, 0.01, 1e-3, 1e-4)},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/hard_limits"))
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--updates", type=int, help="updates of a run (default: 12 for anchor, 8 for the others)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        file = options.output_dir / f"{name}.yaml"
        file.write_text(json.dumps({"common": COMMON, "settings": COMPARISONS[name]}))  # JSON is YAML
        updates = options.updates or UPDATES[name]
        counts = ["--updates", str(updates), "--seeds", *map(str, seeds_of(name, options))]
        counts += ["--processes", str(options.processes)]
        status = trustkl(["compare", str(file), "--output-dir", str(options.output_dir / name), *counts])
        if status != 0:
            return status
    rows = [
        row_of(options.output_dir / comparison / slug(setting) / f"seed-{seed}", comparison, setting, seed)
        for comparison in options.only
        for setting in COMPARISONS[comparison]
        for seed in seeds_of(comparison, options)
    ]
    write_csv(DATA / "hard_limits.csv", rows)
    (DATA / "hard_limits.md").write_text(as_markdown(rows), encoding="utf-8")
    print((DATA / "hard_limits.md").read_text(encoding="utf-8"))
    return 0


def seeds_of(comparison: str, options: argparse.Namespace) -> list[int]:
    """One seed for the comparison of four limits, whose shares are over all updates of a run."""
    return options.seeds[:1] if comparison == "tokens" else options.seeds


def row_of(folder: Path, comparison: str, setting: str, seed: int) -> dict[str, Any]:
    """The numbers of one run."""
    run = read_run(folder)
    records = run.records
    metrics = of_run(run, last=max(1, len(records) // 4))
    decided = Counter(record.trust.decided for record in records if record.trust.decided is not None)
    certificates = [record.trust.certificate for record in records if record.trust.certificate is not None]
    return {
        "comparison": comparison, "setting": setting, "seed": seed, "updates": len(records),
        "score": metrics["score"], "distinct_2": metrics["distinct_2"], "ref_logp": metrics["ref_logp"],
        "kl_to_reference": metrics["kl"], "largest_kl_to_reference": largest(column(records, "anchor.kl_exact")),
        "largest_kl_after": largest(column(records, "anchor.kl_after")),
        "over_anchor_bound": sum(over_the_bound(record) for record in records),
        "largest_update_kl": largest(column(records, "trust.kl")),
        "largest_token_kl": largest(column(records, "trust.kl_max")),
        "largest_response_kl": largest(column(records, "trust.kl_response_max")),
        "shortened": float((column(records, "trust.scale") < 1).mean()),
        "blocked": float((column(records, "trust.scale") == 0).mean()),
        "decided": "; ".join(f"{name} {count}" for name, count in decided.most_common()),
        "gain_above_bound": sum(each.difference > 0 for each in certificates) / len(records),
        "certified": sum(map(is_certified, certificates)) / len(records),
        "seconds": float(np.median([record.seconds["total"] for record in records])),
    }  # fmt: skip


def over_the_bound(record: BoundRecord) -> bool:
    """Whether the KL to the reference ended above what was enforced."""
    anchor = record.anchor
    return anchor.limit is not None and (anchor.guaranteed is None or not (anchor.kl_after or 0.0) <= anchor.guaranteed)


COLUMNS = {
    "score": "score", "kl_to_reference": "KL to the reference", "distinct_2": "distinct-2",
    "largest_kl_after": "largest after an update", "largest_update_kl": "largest update KL, mean",
    "largest_token_kl": "one token", "largest_response_kl": "one response",
}  # fmt: skip
SHARES = {"shortened": "shortened", "blocked": "blocked", "certified": "certified"}


EXPLANATION = """
Mean ± sample standard deviation over the seeds. Score, KL to the reference (at rollout, nats per response) and distinct-2
over the last quarter of a run. Largest after an update: KL(π‖π_ref) on the contexts of the batch, in nats per response.
Largest update KL: KL(π_old‖π) in nats per token, of one token and summed over one response. Shares of the updates:
shortened by a limit; blocked, so that nothing changed; certified on their batch. Decided by: the number of updates over
all seeds.
"""


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each comparison: mean ± standard deviation over the seeds."""
    lines = [f"SmolLM2-135M, QLoRA, updates of 16 responses of 16 tokens. {machine('cpu')}."]
    for comparison in dict.fromkeys(row["comparison"] for row in rows):
        of_comparison = [row for row in rows if row["comparison"] == comparison]
        heads = ["setting", "seeds", *COLUMNS.values(), *SHARES.values(), "decided by"]
        lines += [
            "",
            f"**{comparison}**, {of_comparison[0]['updates']} updates",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
        ]
        for setting in dict.fromkeys(row["setting"] for row in of_comparison):
            some = [row for row in of_comparison if row["setting"] == setting]
            lines.append(f"| {' | '.join([setting, str(len(some)), *cells(some)])} |")
    return "\n".join(lines) + "\n" + EXPLANATION


def cells(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for name in COLUMNS:
        values = np.array([row[name] for row in rows], dtype=np.float64)
        known = np.isfinite(values).any()
        found.append(f"{number(float(np.nanmean(values)))} ± {number(spread(values), 2)}" if known else "–")
    for name in SHARES:
        values = np.array([row[name] for row in rows], dtype=np.float64)
        found.append(percent(float(np.nanmean(values))) if np.isfinite(values).any() else "–")
    decided: Counter[str] = Counter()
    for row in rows:
        for part in filter(None, row["decided"].split("; ")):
            name, _, count = part.rpartition(" ")
            decided[name] += int(count)
    found.append(", ".join(f"{name} {count}" for name, count in decided.most_common()) or "–")
    return found


if __name__ == "__main__":
    sys.exit(main())
