"""The demo with GRPO: the same task with TRL's GRPO trainer, whose every update is kept within a hard limit."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import require_packages
from .run import PACKAGES, announce, print_files, train

SECONDS = "15 to 20"
"""What an update takes on two CPU cores, with bf16 instructions and without."""


class Options(NamedTuple):
    """The settings of the demo; `max_kl` in nats per token. The learning rate is far too high without the limit."""

    output_dir: str = "runs/demo-grpo"
    updates: int = 32
    max_kl: float = 0.02
    learning_rate: float = 4e-3
    seed: int = 42


def run(options: Options) -> int:
    """Train, evaluate before and after, and print the results; returns 0, or 130 after Ctrl-C."""
    require_packages("The demo", *PACKAGES)
    from rich.console import Console

    from .task import quieten

    quieten()
    from .table import LiveReport
    from .task import sentiment_grpo_trainer

    console = Console(highlight=False)
    console.print("Loading SmolLM2-135M-Instruct …", style="dim")
    table = LiveReport(console, total=options.updates)
    trainer = sentiment_grpo_trainer(
        options.output_dir,
        callbacks=[table],
        seed=options.seed,
        max_steps=options.updates,
        learning_rate=options.learning_rate,
        trust_max_kl=options.max_kl,
    )
    announce(console, options.updates, SECONDS)
    before = trainer.evaluate()["eval_reward"]
    console.print(_evaluation_line("before", before))
    status = train(trainer, table, console, Path(options.output_dir))
    after = trainer.evaluate()["eval_reward"] if status == 0 else None
    conclude(console, options, before, after, table.records, table.rendered)
    return status


def _evaluation_line(when: str, score: float) -> str:
    return f"Held-out prompts {when}: score {score:+.2f}"


def conclude(
    console: Any, options: Options, before: float, after: float | None, done: list[Any], report: Path | None
) -> None:
    """Print what changed, what the limit did, and where the files are."""
    from rich.text import Text

    from ..report.text import one_line

    console.print()
    if after is not None:
        console.print(_evaluation_line("before", before))
        console.print(_evaluation_line("after", after))
        for when, row in zip(("first", "last"), _first_and_last(Path(options.output_dir)), strict=True):
            console.print(Text(f"  Sampled {when + ':':6} {one_line(row['completion'])}"))
        console.print()
    if done:
        console.print(Text(closing(options, done)))
    console.print()
    print_files(console, Path(options.output_dir), len(done), report)


def _first_and_last(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first completion of the run and the last one."""
    from ..records import COMPLETIONS_FILE

    lines = (folder / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0]), json.loads(lines[-1])


def closing(options: Options, done: list[Any]) -> str:
    """What the limit did, and how far the run has moved."""
    from ..report.series import column, largest

    kl, proposed = (largest(column(done, f"trust.{name}")) for name in ("kl", "kl_proposed"))
    held = sum(record.trust.guaranteed is not None for record in done)
    shortened = sum(record.trust.scale is not None and record.trust.scale < 1 for record in done)
    return textwrap.fill(
        f"TRL's GRPO makes one step for each batch of completions. The ratio is then 1 when the loss is computed, so that its "
        f"clip removed {max(record.trust.gated for record in done):.0%} of the gradient in every update and bounds nothing. At "
        f"this learning rate an update would have moved the policy by up to {proposed:.3f} nats per token, measured over the "
        f"full vocabulary. The hard limit of {options.max_kl:g} shortened {shortened} of {len(done)} updates: the largest one "
        f"moved the policy by {kl:.4f}. The limit is guaranteed in {held} of {len(done)} updates, for the tokens of their "
        f"batches. There is no anchor (beta=0): the KL to the model that the run started from has grown to "
        f"{done[-1].anchor.kl_exact:.1f} nats per response.",
        width=80,
    )
