"""`trustkl compare`: the same task under several settings and seeds, and conclusions from the numbers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare import settings, task
from ..errors import require_packages
from ..files import create_folder

if TYPE_CHECKING:
    from ..compare.runner import Start

PARSER: dict[str, Any] = {
    "help": "run a task under several settings and seeds, and report what each changed",
    "description": (
        "Runs the same task under every setting with every seed, and writes\n"
        "comparison.html, .csv, .md and figures: score, distance to the reference, size\n"
        "of the updates, and conclusions. Finished runs are not repeated: the same\n"
        "command resumes a comparison that was stopped."
    ),
    "epilog": f"SETTINGS.yaml: {settings.__doc__}\n--task: module:function or file.py:function, called as\n    "
    f"function{task.SIGNATURE}\nwith the fields of the setting, "
    "`seed` and `max_steps` as config_changes.",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "settings", nargs="?", metavar="SETTINGS.yaml", help="what to compare (default: anchor × clip, each on and off)"
    )
    parser.add_argument("--output-dir", default="runs/compare", help="folder of all output (default: %(default)s)")
    parser.add_argument("--updates", type=int, help=f"updates of a run (default: the file's, or {settings.UPDATES})")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of each setting (default: the file's, or 42)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--last", type=int, help="updates at the end to average over (default: a quarter)")
    parser.add_argument(
        "--limit", type=float, default=settings.LIMIT,
        help="count updates with a KL to the previous policy above this, in nats per token (default: %(default)s, the bound "
        "that a clip range of 0.2 would give if ratios stayed in it)",
    )  # fmt: skip
    parser.add_argument("--task", help="what to train (default: the demo's task)")
    parser.add_argument("--overwrite", action="store_true", help="replace runs that were made with other settings")


def run(options: argparse.Namespace, start: Start | None = None) -> int:
    """Run the comparison. `start` starts the process of a run; by default a new interpreter."""
    require_packages("A comparison", "jinja2", "matplotlib", "rich")
    from rich.console import Console

    comparison, name = prepare(options)
    create_folder("output_dir", options.output_dir)
    # After `prepare`, which turns the warnings off that libraries print while they are imported.
    from ..compare import page, terminal
    from ..compare.runner import jobs, start_process, unfinished

    folder = Path(options.output_dir)
    planned = jobs(comparison, folder, name)
    left = unfinished(planned, overwrite=options.overwrite)
    console = Console(highlight=False, markup=False, emoji=False)
    terminal.show_plan(console, comparison, folder, len(planned), len(planned) - len(left))
    try:
        outcomes = terminal.make(console, comparison, planned, left, options.processes, start or start_process)
    except KeyboardInterrupt:
        terminal.say(console, "Stopped. Finished runs are kept; the same command resumes from here.")
        return 130
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if report := page.collect(comparison, name, planned, failed, last=options.last, limit=options.limit):
        page.save(report, folder)
        terminal.show(console, report, folder)
    terminal.show_failed(console, failed)
    return 1 if failed else 0


def prepare(options: argparse.Namespace) -> tuple[settings.Comparison, str]:
    """The comparison and the task's name; everything is checked before anything runs."""
    from ..demo.task import quieten, sentiment_config, sentiment_grpo_config
    from ..errors import ConfigError, out_of_range

    quieten()
    for field, value in (("--processes", options.processes), ("--last", options.last)):
        if value is not None and value < 1:
            raise out_of_range(field, value, "an integer >= 1")
    if not (math.isfinite(options.limit) and options.limit > 0):
        raise out_of_range("--limit", options.limit, "a positive number of nats per token")
    comparison = settings.read(options.settings, updates=options.updates, seeds=options.seeds)
    if options.last is not None and options.last > comparison.updates:
        raise out_of_range("--last", options.last, f"at most the {comparison.updates} updates of a run")
    known = {"ppo": (task.SENTIMENT, sentiment_config), "grpo": (task.SENTIMENT_GRPO, sentiment_grpo_config)}
    own, build = known.get(comparison.trainer, ("", None))
    if not (options.task or own):
        raise ConfigError(
            f"--task is required with `trainer: {comparison.trainer}`: the demo's own task exists only for ppo and grpo."
        )
    name = task.resolve(options.task or own)
    task.load(name)
    return settings.validate(comparison, build if name == own else None), name
