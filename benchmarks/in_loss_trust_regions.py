"""Trust regions within the loss, on a real language model: clip rules, TROLL's projection and response masks.

SmolLM2-135M-Instruct with a 4-bit backbone and LoRA is trained with a reward for positive sentiment, with two epochs of two
mini-batches, so that ratios leave 1 within an update. Each rule is run with and without a hard limit on the mean
KL(π_old‖π), and with several seeds: how far the updates go, what the rule gated, and what the score does.

    python benchmarks/in_loss_trust_regions.py    # benchmarks/data/in_loss_trust_regions.csv and .md

It is a run of `trustkl compare`, so that the same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import DATA, machine, write_csv

from trl_trustkl.cli import main as trustkl
from trl_trustkl.compare.metrics import of_run, spread
from trl_trustkl.compare.settings import slug
from trl_trustkl.report import read_run
from trl_trustkl.report.series import column, largest, mean
from trl_trustkl.report.text import number, percent

LIMIT = 0.02
"""Nats per token: `trust_max_kl`, where it is on."""
COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "response_length": 16,
    "learning_rate": 2e-3,
    "max_grad_norm": None,
}
RULES: dict[str, dict[str, Any]] = {
    "none": {"clip_rule": "none"},
    "ppo": {"clip_rule": "ppo"},
    "dppo_kl": {"clip_rule": "dppo_kl"},
    "drpo": {"clip_rule": "drpo"},
    "gspo": {"clip_rule": "gspo", "cliprange": 3e-4, "cliprange_high": 4e-4},
    "troll": {"clip_rule": "troll"},
    "response masks": {"clip_rule": "none", "response_mask_kl": 0.1},
}
"""gspo with the paper's range and its mean over responses, which is its default here."""
SETTINGS = {
    name if limit is None else f"{name}, hard limit": fields | {"trust_max_kl": limit}
    for name, fields in RULES.items()
    for limit in (None, LIMIT)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/in_loss_trust_regions"))
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "settings.yaml"
    file.write_text(json.dumps({"common": COMMON, "settings": SETTINGS}))  # JSON is YAML
    counts = ["--updates", str(options.updates), "--seeds", *map(str, options.seeds)]
    counts += ["--processes", str(options.processes)]
    status = trustkl(["compare", str(file), "--output-dir", str(options.output_dir / "runs"), *counts])
    if status != 0:
        return status
    rows = [
        row_of(options.output_dir / "runs" / slug(setting) / f"seed-{seed}", setting, seed)
        for setting in SETTINGS
        for seed in options.seeds
    ]
    write_csv(DATA / "in_loss_trust_regions.csv", rows)
    (DATA / "in_loss_trust_regions.md").write_text(as_markdown(rows), encoding="utf-8")
    print((DATA / "in_loss_trust_regions.md").read_text(encoding="utf-8"))
    return 0


def row_of(folder: Path, setting: str, seed: int) -> dict[str, Any]:
    """The numbers of one run."""
    run = read_run(folder)
    records = run.records
    metrics = of_run(run, last=max(1, len(records) // 4))
    return {
        "setting": setting, "seed": seed, "updates": len(records), "score": metrics["score"],
        "kl_to_reference": metrics["kl"], "update_kl": mean(column(records, "trust.kl")),
        "largest_update_kl": largest(column(records, "trust.kl")),
        "largest_proposed_kl": largest(column(records, "trust.kl_proposed")),
        "largest_token_kl": largest(column(records, "trust.kl_max")),
        "gated": mean(column(records, "trust.gated")), "masked": mean(column(records, "trust.masked")),
        "shortened": float((column(records, "trust.scale") < 1).mean()),
    }  # fmt: skip


COLUMNS = {
    "score": "score", "kl_to_reference": "KL to the reference", "update_kl": "update KL, mean",
    "largest_update_kl": "largest", "largest_proposed_kl": "largest proposed", "largest_token_kl": "largest of a token",
}  # fmt: skip
SHARES = {"gated": "gated", "masked": "masked", "shortened": "shortened"}
EXPLANATION = """
Mean ± sample standard deviation over the seeds. Score and KL to the reference (at rollout, nats per response) over the last
quarter of a run. Update KL: KL(π_old‖π) after an update, in nats per token; proposed: before the hard limit. Gated, masked: the
mean share that the clip rule and response masks removed of Σ|w·A|. Shortened: the share of the updates that the hard limit
shortened.
"""


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, for each setting."""
    heads = ["setting", "seeds", *COLUMNS.values(), *SHARES.values()]
    lines = [
        f"SmolLM2-135M, QLoRA, {rows[0]['updates']} updates of 16 responses of 16 tokens, 2 epochs of 2 mini-batches, learning "
        f"rate 2e-3; hard limit {LIMIT} nats per token. {machine('cpu')}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row for row in rows if row["setting"] == setting]
        values = {name: np.array([row[name] for row in some], dtype=np.float64) for name in (*COLUMNS, *SHARES)}
        cells = [f"{number(mean(values[name]))} ± {number(spread(values[name]), 2)}" for name in COLUMNS]
        cells += [percent(mean(values[name])) for name in SHARES]
        lines.append(f"| {' | '.join([setting, str(len(some)), *cells])} |")
    return "\n".join(lines) + "\n" + EXPLANATION


if __name__ == "__main__":
    sys.exit(main())
