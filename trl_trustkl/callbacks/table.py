"""The table of updates in a terminal: one line for each record, within 80 columns."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..records import BoundRecord
from ..report.text import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDTH = 80
HEADER = "   #  score    KL target   coef  anchor  clip  KL/token max ratio  bound by"

Show = Callable[[str, str | None], None]
"""Shows a line, in a style where the output has styles."""


def line(record: BoundRecord) -> str:
    """One line of printable characters: score · exact KL to the reference and its target (nats per response) · coefficient ·
    anchor's share · gated share · KL(π_old‖π) after the update (nats per token) · largest ratio · what bound, or why the
    update was rejected."""
    anchor, trust = record.anchor, record.trust
    score = "   –  " if record.score is None else f"{record.score:+.3f}"
    kl, target = anchor.kl_exact, "–" if anchor.target is None else _fit(anchor.target, 5, 1)
    if anchor.target_per_token is not None:
        kl, target = anchor.kl_exact / (record.length or math.nan), _fit(anchor.target_per_token, 5, 3)
    share = "–" if anchor.share is None else f"{anchor.share:.0%}"
    text = (
        f"{record.update:4}  {score} {_fit(kl, 5, 2)}  {target:>5} {_fit(anchor.coef, 6, 3)}  {share:>6} "
        f"{trust.gated:5.0%}  {_fit(trust.kl, 8, 4)} {_fit(trust.max_ratio, 9, 1)}  "
    )
    text += one_line(record.binding if record.refused is None else f"rejected: {record.refused}")
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _fit(value: float, width: int, places: int) -> str:
    """The number in `width` columns, with fewer decimal places if it is large."""
    forms = (f"{value:{width}.{places}f}", f"{value:{width}.0f}", f"{value:{width}.0e}")
    return next((form for form in forms if len(form) <= width), forms[-1])


def printer(progress_bar: bool) -> Show:
    """How lines are printed: with rich in a terminal; as plain text elsewhere, without rich, and above a tqdm progress bar."""
    if not progress_bar and sys.stdout.isatty():
        with suppress(ImportError):
            return _rich()
    return _plain


def _rich() -> Show:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    # Text, because markup in a str would be interpreted.
    return lambda text, style: console.print(Text(text, style=style or ""), soft_wrap=True)


def _plain(text: str, style: str | None) -> None:
    tqdm.write(text)


def updates_bar(console: Console) -> Progress:
    """A progress bar over updates with the remaining time, below the lines of a terminal; nothing elsewhere."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("updates"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600.0,  # the mean of ten minutes, as an update takes seconds
    )
