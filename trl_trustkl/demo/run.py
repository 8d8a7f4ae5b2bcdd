"""The demo: fine-tune a small language model towards positive sentiment, and report what bounded it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import require_packages
from ..records import BOUNDS_FILE, COMPLETIONS_FILE

PACKAGES = ("jinja2", "matplotlib", "rich", "vaderSentiment")
SECONDS = "15 to 25"
"""What an update takes on two CPU cores, with bf16 instructions and without."""


class Options(NamedTuple):
    """The settings of the demo; `kl_target` in nats per response."""

    output_dir: str = "runs/demo"
    updates: int = 20
    kl_target: float = 8.0
    kl_coef: float = 0.05
    cliprange: float = 0.2
    learning_rate: float = 1.2e-3
    seed: int = 42


def run(options: Options) -> int:
    """Train, evaluate before and after, and print the results; returns 0, or 128 + the signal that ended the run."""
    require_packages("The demo", "bitsandbytes", *PACKAGES)
    from rich.console import Console

    from .task import quieten

    quieten()
    console = Console(highlight=False)
    console.print("Loading SmolLM2-135M-Instruct with a 4-bit backbone …", style="dim")
    trainer, table = build(options, console)
    announce(console, options.updates, SECONDS)
    before = evaluate(trainer)
    console.print(_evaluation_line("before", before))
    status = train(trainer, table, console, Path(options.output_dir))
    after = evaluate(trainer) if status == 0 else None
    conclude(console, options, before, after, table.records, table.rendered)
    return status


def announce(console: Any, updates: int, seconds: str) -> None:
    """Print how long the run takes."""
    import torch

    each = "" if torch.cuda.is_available() else f" of {seconds} seconds each on two CPU cores"
    console.print(f"{updates} updates{each}; Ctrl-C ends the run.", style="dim")


def train(trainer: Any, table: Any, console: Any, folder: Path) -> int:
    """Train with the progress bar, and save the adapter; returns 0, or 128 + the signal that ended the run."""
    from ..errors import Interrupted

    status = 0
    with table.progress:
        try:
            trainer.train()
        except Interrupted as end:
            status = end.code
        except KeyboardInterrupt:
            console.print("Stopped.", style="yellow")
            status = 130
    trainer.save_model(str(folder / "adapter"))
    return status


def build(options: Options, console: Any) -> tuple[Any, Any]:
    """The trainer and the live table of its updates."""
    from .table import LiveReport
    from .task import sentiment_trainer

    table = LiveReport(console, total=options.updates)
    trainer = sentiment_trainer(
        options.output_dir,
        callbacks=[table],
        seed=options.seed,
        max_steps=options.updates,
        # A micro-batch for each mini-batch: half as many passes as the task's, of twice the rows, take less time.
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=options.learning_rate,
        kl_controller="adaptive",
        kl_coef=options.kl_coef,
        kl_target=options.kl_target,
        kl_horizon=32,
        # Below the target, β would keep falling and be far too small when the target is reached.
        kl_controller_kwargs={"min_coef": options.kl_coef},
        cliprange=options.cliprange,
        attribution_every=min(20, options.updates),
    )
    return trainer, table


def evaluate(trainer: Any) -> dict[str, Any]:
    """On the held-out prompts: mean score, mean KL to the reference, and one reply to show."""
    rows = trainer.evaluate_completions()
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("score", "kl")}
    return {**mean, "prompt": rows[0]["prompt"][-1]["content"], "completion": rows[0]["completion"]}


def _evaluation_line(when: str, result: dict[str, Any]) -> str:
    return (
        f"Held-out prompts {when}: score {result['score']:+.2f}, KL to the reference {result['kl']:.2f} nats/response"
    )


def conclude(
    console: Any,
    options: Options,
    before: dict[str, Any],
    after: dict[str, Any] | None,
    done: list[Any],
    report: Path | None,
) -> None:
    """Print what changed, what each mechanism did, and where the files are."""
    from rich.padding import Padding
    from rich.text import Text

    from ..report.text import one_line

    console.print()
    if after is not None:
        console.print(_evaluation_line("before", before))
        console.print(_evaluation_line("after", after))
        console.print(Padding(Text(f"Prompt:  {one_line(before['prompt'])}", style="dim"), (0, 0, 0, 2)))
        for when, result in (("Before", before), ("After", after)):
            console.print(Padding(Text(f"{when + ':':8} {one_line(result['completion'])}"), (0, 0, 0, 2)))
        console.print()
    if done:
        console.print(Text(closing(options, done)))
    console.print()
    print_files(console, Path(options.output_dir), len(done), report)


def print_files(console: Any, folder: Path, updates: int, report: Path | None) -> None:
    """Print where the files of a run are, of those that exist."""
    from rich.text import Text

    files = {
        "Records:": (folder / BOUNDS_FILE, f" (a line for each of {updates} update{'s' if updates != 1 else ''})"),
        "Report:": (report, ""),
        "Completions:": (folder / COMPLETIONS_FILE, ""),
        "Adapter:": (folder / "adapter", " (AutoPeftModelForCausalLM.from_pretrained)"),
    }
    for title, (place, note) in files.items():
        if place is not None and place.exists():
            console.print(Text(f"{title:13} {place}{note}"))


def closing(options: Options, done: list[Any]) -> str:
    from ..report.series import attributed, factors
    from ..report.summary import counterfactuals

    last = done[-max(1, len(done) // 3) :]
    kl = sum(record.anchor.kl_exact for record in last) / len(last)
    clipped = sum(record.trust.gated for record in done) / len(done)
    steps = [record.trust.kl for record in done]
    binding = [record.binding for record in done]
    most = max(sorted(set(binding)), key=binding.count)
    mechanism = "none of them" if most == "none" else f"the {most}"
    rerun = attributed(done)
    outcomes = f"{counterfactuals(factors(done), len(rerun))} " if rerun else ""
    ratio = max(record.trust.max_ratio for record in done)
    low, high = 1 - options.cliprange, 1 + options.cliprange
    where = "outside" if ratio > high else "within"
    return textwrap.fill(
        f"The anchor penalised the KL to the model that the run started from: over the last {len(last)} updates, this KL "
        f"averaged {kl:.1f} nats per response (target {options.kl_target:g}), and its coefficient went from "
        f"{done[0].anchor.coef:.3f} to {done[-1].anchor.coef:.3f}. The trust region compared each policy with the one that "
        f"had sampled the batch: the clip removed {clipped:.0%} of the gradient's weight on average, and an update moved the "
        f"policy by {sum(steps) / len(steps):.3f} nats per token on average and {max(steps):.3f} at most. This was measured "
        f"after each update, and nothing guaranteed it: with clipping on, the largest probability ratio was {ratio:.1f}, "
        f"{where} [{low:g}, {high:g}]. What limited an update most was {mechanism} "
        f"in {binding.count(most)} of {len(done)} updates. {outcomes}The anchor "
        "determines where the run ends, and the trust region how fast it gets there.",
        width=80,
    )
