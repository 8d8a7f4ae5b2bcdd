"""What each mechanism is worth, over seeds: the runs behind the figures and tables of the README.

    learning_rate  TRL's GRPO at its defaults, at four learning rates across two orders of magnitude: plain, with a hard limit
                   (max_kl), and with the limit and a learning rate that adapts to it (max_kl, lr_target)
    four_corners   PPO with anchor and clip, with either one, and with neither
    mechanisms     PPO with every mechanism, and what every second update would have been without each of them

The model is SmolLM2-135M-Instruct with LoRA. The reward is positive sentiment on the subject of the prompt, without repeated
words (study_task.py): it can be verified, and a policy that collapses onto one phrase loses it. Scores are of held-out prompts.

A run collapsed if, on the held-out prompts after it, the score is below that before it, the share of distinct pairs of words is
less than half of that before it, or the reference's log-likelihood is more than 3 nats per token below that before it.

    python benchmarks/study.py                      # all runs that are missing, then tables and figures
    python benchmarks/study.py --only learning_rate --seeds 42 43
    python benchmarks/study.py --no-run             # tables and figures of the runs that there are

A finished run is a file of benchmarks/data/study/, so that any number of sittings, on any machine, complete the study: all runs
take seven to nine hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import study_page
from common import DATA, ROOT, machine

from trl_trustkl.compare.runner import Job, Outcome, Runner, jobs, unfinished
from trl_trustkl.compare.settings import CORNERS, Comparison, slug
from trl_trustkl.files import write_atomically
from trl_trustkl.records import load_records

TASKS = Path(__file__).parent / "study_task.py"
SEEDS = [42, 43, 44, 45, 46]
LEARNING_RATES = (2e-4, 1e-3, 4e-3, 2e-2)
LIMIT = {"trust_max_kl": 0.02}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_kl": LIMIT,
    "max_kl, lr_target": LIMIT | {"trust_lr_target": 0.01},
}
ALL = {
    "kl_coef": 0.05, "clip_rule": "ppo", "max_grad_norm": 1.0, "trust_coef": 0.1, "trust_stop": 0.05, "trust_max_kl": 0.02,
    "trust_lr_target": 0.01, "attribution_every": 2,
}  # fmt: skip
CURVES = (
    "score", "length", "entropy", "lr", "anchor.kl_exact", "trust.kl", "trust.kl_proposed", "trust.kl_max", "trust.max_ratio",
    "trust.gated", "trust.scale", "binding", "counterfactual",
)  # fmt: skip
"""What is kept of the record of each update."""


class Experiment(NamedTuple):
    """task: the function of the file of tasks. settings: fields of the trainer's configuration by the setting's name."""

    task: str
    updates: int
    settings: dict[str, dict[str, Any]]


EXPERIMENTS = {
    "learning_rate": Experiment(
        "grpo", 30,
        {f"{arm}, {rate:g}": fields | {"learning_rate": rate} for rate in LEARNING_RATES for arm, fields in ARMS.items()},
    ),
    "four_corners": Experiment("ppo", 20, CORNERS),
    "mechanisms": Experiment("ppo", 20, {"every mechanism": ALL}),
}  # fmt: skip


class Progress:
    """Saves each run when it ends, and prints a line for it."""

    def __init__(self, data: Path, experiment: str, count: int) -> None:
        self.data, self.experiment, self.count = data, experiment, count
        self.done = 0
        self.failed: list[str] = []

    def started(self, job: Job) -> None:
        print(f"{time.strftime('%H:%M')} begins   {self.experiment}: {job.title}", flush=True)

    def ended(self, outcome: Outcome) -> None:
        self.done += 1
        if outcome.error is None:
            save(outcome.job, self.data, self.experiment)
        else:
            self.failed.append(f"{self.experiment}: {outcome.job.title}: {outcome.error}")
        how = f"finished after {outcome.seconds:.0f} s" if outcome.error is None else f"failed: {outcome.error}"
        print(
            f"{time.strftime('%H:%M')} {self.done}/{self.count}  {self.experiment}: {outcome.job.title} {how}",
            flush=True,
        )

    def progress(self, updates: int) -> None:
        """Nothing: runs take minutes."""


def file_of(job: Job, data: Path, experiment: str) -> Path:
    return data / experiment / f"{slug(job.setting)}-seed-{job.seed}.json"


def made_with(job: Job) -> dict[str, Any]:
    """What a saved run was made with; the file of the tasks by its name alone."""
    return {**job.made_with, "task": Path(job.made_with["task"]).name}


def save(job: Job, data: Path, experiment: str) -> None:
    """Keep what the tables and figures need of a finished run."""
    records = load_records(job.folder)
    run = {
        "experiment": experiment, "setting": job.setting, "seed": job.seed, "made_with": made_with(job),
        "machine": machine("cpu"), "seconds": sum(record["seconds"]["total"] for record in records),
        "held_out": json.loads((job.folder / "held_out.json").read_text("utf-8")),
        "curves": {key: [_of(record, key) for record in records] for key in CURVES},
    }  # fmt: skip
    path = file_of(job, data, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(run, ensure_ascii=False))


def _of(record: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        record = record[part]
    return float(f"{record:.6g}") if isinstance(record, float) else record


def planned(name: str, experiment: Experiment, options: argparse.Namespace) -> list[Job]:
    """The experiment's runs, with all settings of the first seed first."""
    updates = options.updates or experiment.updates
    comparison = Comparison(updates, tuple(options.seeds), experiment.settings)
    return jobs(comparison, options.output_dir / name, f"{options.tasks.resolve()}:{experiment.task}")


def missing(all_runs: Sequence[Job], data: Path, experiment: str) -> list[Job]:
    """Those without a file, or whose file was made with other settings."""
    left = []
    for job in all_runs:
        file = file_of(job, data, experiment)
        if not file.exists() or json.loads(file.read_text("utf-8"))["made_with"] != made_with(job):
            left.append(job)
    return left


def run(name: str, experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """Make the missing runs; returns what failed."""
    left = missing(planned(name, experiment, options), options.data, name)
    progress = Progress(options.data, name, len(left))
    # A run may be finished without having been saved, if the study was stopped at that moment.
    again = unfinished(left, overwrite=True)
    for job in left:
        if job not in again:
            progress.ended(Outcome(job, 0.0, None))
    if again:
        with Runner(options.processes, progress) as runner:
            runner.run(again)
    return progress.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--updates", type=int, help="updates of a run (default: 30 with GRPO, 20 with PPO)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--no-run", action="store_true", help="only make tables and figures")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"), help="folder of unfinished runs")
    parser.add_argument("--data", type=Path, default=DATA / "study", help="folder of finished runs")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--tasks", type=Path, default=TASKS, help="a file with functions grpo and ppo")
    options = parser.parse_args()
    failed: list[str] = []
    try:
        for name in [] if options.no_run else options.only:
            failed += run(name, EXPERIMENTS[name], options)
    except KeyboardInterrupt:
        print("Stopped. Finished runs are kept; the same command makes the others.")
        return 130
    print(study_page.write(options.data, options.figures, limit=LIMIT["trust_max_kl"]))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
