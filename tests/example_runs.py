"""Made-up records of runs: rows of `bounds.jsonl` and `completions.jsonl`, run folders, and a `BoundRecord`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_trustkl.records import AnchorRecord, BoundRecord, GradientRecord, SamplerRecord, TrustRecord, ValueRecord
from trl_trustkl.report import read_run
from trl_trustkl.report.schema import Run

Row = dict[str, Any]
QUANTILES = {"0.01": 0.7, "0.05": 0.8, "0.25": 0.95, "0.5": 1.0, "0.75": 1.05, "0.95": 1.2, "0.99": 1.4}


HEALTHY: Row = {
    "update": 1, "episode": 16, "score": 0.4, "length": 20.0, "eos_rate": 0.9, "entropy": 2.5, "lr": 1e-3,
    "refused": None, "seconds": {"generate": 3.0, "score": 2.0, "optimise": 5.0, "measure": 1.0, "total": 11.0},
    "anchor": {
        "estimator": "k1", "placement": "reward", "gradient": "exact", "coef": 0.05, "target": 6.0, "kl": 5.8,
        "kl_exact": 6.0, "kl_stderr": 0.3, "kl_per_token": 0.29, "target_per_token": None, "share": 0.2,
    },
    "trust": {
        "rule": "ppo", "low": 0.2, "high": 0.2, "gated": 0.1, "gated_low": 0.04, "gated_high": 0.06, "coef": 0.0,
        "epochs": 2.0, "stopped": False, "kl": 0.01, "kl_max": 0.3, "kl_response_max": 0.5, "kl_proposed": 0.01,
        "tv": 0.05, "max_ratio": 2.0, "ratio_quantiles": QUANTILES, "scale": None, "tries": 0, "limit": None,
        "guaranteed": None, "certificate": None,
    },
    "value": {"clip": 0.2, "gated": 0.05, "explained_variance": 0.4},
    "gradient": {"norm": 0.5, "max_norm": 1.0, "scale": 1.0},
    "sampler": {"kl": 0.0005, "ratio_min": 0.9, "ratio_max": 1.1, "truncated": None},
    "binding": "clip",
}  # fmt: skip


SAMPLE_KEYS: Row = {"update": 1, "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": -50.0}
"""A row of `completions.jsonl`."""


def rows_of(count: int = 12, **changes: Any) -> list[Row]:
    """Healthy rows with changes such as `trust__kl=0.1` or `lr=lambda p: 1e-3 * p`, where p runs from 1/count to 1."""
    rows = []
    for number in range(1, count + 1):
        row = copy.deepcopy(HEALTHY) | {"update": number, "episode": 16 * number}
        for key, value in changes.items():
            place, (*path, last) = row, key.split("__")
            for step in path:
                place = place[step]
            place[last] = value(number / count) if callable(value) else value
        rows.append(row)
    return rows


def rising(p: float) -> float:
    """A score that rises over the run, for `rows_of`."""
    return 0.2 + 0.6 * p


def trl_rows(count: int = 12, **changes: Any) -> list[Row]:
    """Rows as those of a TRL trainer, which lack what it does not log."""
    unknown = {
        "anchor__kl_exact": None, "anchor__kl_stderr": None, "anchor__share": None, "anchor__estimator": "k3",
        "anchor__placement": "loss", "anchor__gradient": "partial", "trust__kl": None, "trust__kl_max": None,
        "trust__kl_response_max": None, "trust__kl_proposed": None, "trust__tv": None, "trust__max_ratio": None,
        "trust__ratio_quantiles": {},
        "value__clip": None, "value__gated": None, "value__explained_variance": None, "sampler__kl": None,
        "trust__epochs": 1.0, "binding": "unknown",
    }  # fmt: skip
    return rows_of(count, **unknown | changes)


def completions_of(rows: list[Row], ref_logp: Callable[[float], float] = lambda p: -50.0) -> list[Row]:
    """Two rows of `completions.jsonl` for each update."""
    return [
        {"update": row["update"], "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": ref_logp(i / len(rows))}
        for i, row in enumerate(rows, start=1)
        for _ in range(2)
    ]


def write_run(folder: Path, rows: list[Row], completions: list[Row] | None = None) -> Path:
    """Write the rows as the records of a run; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("bounds.jsonl", rows), ("completions.jsonl", completions)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def run_folder(folder: Path, count: int = 12, **changes: Any) -> Path:
    """The folder of a run of healthy rows with changes, completions included."""
    rows = rows_of(count, **changes)
    return write_run(folder, rows, completions_of(rows))


def trl_run(folder: Path, **changes: Any) -> Run:
    """A run of `trl_rows`."""
    return read_run(write_run(folder / "run", trl_rows(**changes)))


def record(update: int = 1, **changes: Any) -> BoundRecord:
    """The record of a healthy update, with changes of its fields."""
    trust = {
        "rule": "ppo", "low": 0.2, "high": 0.2, "gated": 0.25, "gated_low": 0.1, "gated_high": 0.15, "coef": 0.0,
        "epochs": 2.0, "stopped": False, "kl": 0.03, "kl_max": 1.0, "kl_response_max": 1.5, "kl_proposed": 0.03,
        "tv": 0.1, "max_ratio": 9.5, "ratio_quantiles": {"0.5": 1.0}, "scale": None, "tries": 0, "limit": None,
        "guaranteed": None,
    }  # fmt: skip
    anchor = AnchorRecord("k1", "reward", "exact", 0.05, 6.0, 5.5, 5.6, 0.3, 0.2, kl_per_token=0.27)
    settings = {
        "update": update, "episode": 16 * update, "score": 0.4, "length": 20.0, "eos_rate": 0.1, "entropy": 2.5,
        "lr": 1e-3, "refused": None, "seconds": {"total": 1.0}, "anchor": anchor, "trust": TrustRecord(**trust),
        "value": ValueRecord(0.2, 0.0, 0.1), "gradient": GradientRecord(0.5, 1.0, 1.0), "sampler": SamplerRecord(0.0),
        "binding": "clip",
    }  # fmt: skip
    return BoundRecord(**settings | changes)
