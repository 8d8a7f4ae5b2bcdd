"""The section of a model card that says how far a run may have moved its model, from records and configuration.

The Markdown is made without the packages of a report, which saving a model does not need. Every text passes through
`markdown`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..records import BoundRecord
from ..surrogates import SEQUENCE_RANGE, WITHOUT_RANGE
from ..trust.limits import HARD_LIMITS
from .schema import Run, read_run
from .summary import guaranteed, largest_update
from .text import markdown, number, shortened, visible

logger = logging.getLogger(__name__)

README = "README.md"
TITLE = "How far it may have moved"
START, END = "<!-- trustkl: section begins -->", "<!-- trustkl: section ends -->"

_SECTION = re.compile(f"\n*{re.escape(START)}.*?{re.escape(END)}\n*", re.DOTALL)
_FOLLOWING = re.compile(r"^#+ Citations?$", re.MULTILINE)


def with_section(card: str, section: str) -> str:
    """The card with the section, which replaces an earlier one, or else is inserted before the citations or at the end."""
    block = f"\n\n{START}\n{section.strip()}\n{END}\n\n"
    card, replaced = _SECTION.subn(lambda _: block, card, count=1)
    if not replaced:
        following = _FOLLOWING.search(card)
        place = following.start() if following else len(card)
        card = f"{card[:place].rstrip()}{block}{card[place:].lstrip()}"
    return card.rstrip() + "\n"


def section(records: Sequence[BoundRecord], args: Any, report: str | None = None) -> str:
    """The section as Markdown. records: of the run so far; args: a TrustKLPPOConfig; report: a relative link, or None."""
    lines = [f"## {TITLE}", "", "| mechanism | settings |", "|---|---|"]
    lines += [f"| {markdown(name)} | {markdown(said)} |" for name, said in mechanisms(args)]
    lines += ["", *(f"- {text}" for text in outcome(records))]
    if report is not None:
        lines += ["", f"What bounded each update: [{markdown(Path(report).name)}](<{_target(report)}>)."]
    return "\n".join(lines) + "\n"


def written(create: Callable[[], None]) -> bool:
    """Whether TRL's card could be created: its template needs a package that TRL does not always require."""
    try:
        create()
    except ModuleNotFoundError as error:
        logger.warning(f"No model card was written: the package {error.name} is not installed.")
        return False
    return True


def describe(folder: Path, args: Any, *, update: int, report: Path | None) -> None:
    """Put the section into the folder's README, which PEFT or TRL wrote; without one, into a copy of TRL's.

    update: the last one with a record in `args.output_dir`, 0 if no records are written. report: the page of the run.
    """
    output = Path(args.output_dir)
    readme = folder / README
    source = readme if readme.exists() or is_of_user(output) else output / README
    if source.exists():
        link = None if report is None else os.path.relpath(report, folder)
        text = source.read_text(encoding="utf-8", errors="replace")
        readme.write_text(with_section(text, section(_recorded(output, update), args, link)), encoding="utf-8")


def is_of_user(folder: Path) -> bool:
    """Whether the folder has a README to which `describe` has not written: it is not ours to replace."""
    readme = folder / README
    return readme.exists() and START not in readme.read_text(encoding="utf-8", errors="replace")


def _recorded(output: Path, update: int) -> list[BoundRecord]:
    """The records in a run's folder up to an update."""
    try:
        found = read_run(output, completions=False).records if update else []
    except DataError:
        return []
    return [record for record in found if record.update <= update]


def mechanisms(args: Any) -> list[tuple[str, str]]:
    """Each mechanism with its settings, or "off"; args: a TrustKLPPOConfig, TrustKLGRPOConfig or TrustKLRLOOConfig."""
    if not hasattr(args, "kl_coef"):
        return _mechanisms_of_groups(args)
    penalised = args.trust_coef != 0 or args.trust_controller != "fixed"
    return [
        ("anchor: KL(π‖π_ref)", _penalty(args, args.anchored, "kl", ("estimator", "placement", "coef"), "response")),
        ("clip", _clip(args)),
        ("penalty on KL(π_old‖π)", _penalty(args, penalised, "trust", ("estimator", "coef"), "token")),
        ("response masks", _limit(args, "response_mask_kl", "nats")),
        *_limits(args),
    ]


def _mechanisms_of_groups(args: Any) -> list[tuple[str, str]]:
    """Those of TRL's GRPO and RLOO trainers with this package's fields."""
    anchor = "off"
    if args.beta > 0:
        anchor = _setting(args, "beta")
        if args.kl_controller != "fixed":
            anchor += f", {_setting(args, 'kl_controller')}, {_setting(args, 'kl_target')} nats per token"
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    clip = f"range [{number(1 - args.epsilon)}, {number(1 + high)}]"
    if args.num_iterations == 1 and args.steps_per_generation <= args.gradient_accumulation_steps:
        clip += ", without effect: one optimizer step for each generation batch, so that the ratio is 1"
    return [
        ("anchor: KL(π‖π_ref)", anchor),
        ("clip", clip),
        *_limits(args),
    ]


def _limits(args: Any) -> list[tuple[str, str]]:
    """The mechanisms that every trainer has."""
    return [
        ("early stop", _limit(args, "trust_stop")),
        ("hard limits, by backtracking", _hard_limits(args)),
        ("KL-adaptive learning rate", _limit(args, "trust_lr_target")),
        ("gradient norm", _setting(args, "max_grad_norm") if args.max_grad_norm else "off"),
    ]


def outcome(records: Sequence[BoundRecord]) -> list[str]:
    """The KL at the end, the largest update, and what is guaranteed, as Markdown."""
    if not records:
        return ["There are no records of the run, so it is not known how far it moved."]
    last = records[-1].anchor
    run = Run("", Path(), list(records), [], [])
    exact = (
        f"{number(last.kl_exact)} ± {number(last.kl_stderr, 2)} nats per response (exact, over the full vocabulary, before "
        "that update's step; mean and standard error over its responses)"
    )
    return [
        f"**KL to the reference** in the last of {len(records):,} update{'s' if len(records) > 1 else ''}: "
        + (exact if math.isfinite(last.kl_exact) else "not on record, because the trainer had no reference")
        + ".",
        f"**Largest update.** {markdown(largest_update(run))}",
        f"**Guaranteed.** {markdown(guaranteed(run))}",
    ]


def _penalty(args: Any, on: bool, prefix: str, settings: Sequence[str], per: str) -> str:
    """The settings of a KL penalty, whose fields begin with `prefix`, and its controller."""
    if not on:
        return "off"
    parts = [_setting(args, f"{prefix}_{name}") for name in settings]
    if getattr(args, f"{prefix}_controller") != "fixed":
        parts.append(_setting(args, f"{prefix}_controller") + _options(args, f"{prefix}_controller_kwargs"))
    if getattr(args, f"{prefix}_target") is not None:
        parts.append(f"{_setting(args, f'{prefix}_target')} nats per {per}")
    return ", ".join(parts)


def _options(args: Any, field: str) -> str:
    """A field that holds arguments, in parentheses; empty if there are none."""
    options = shortened(", ".join(f"{name}={value}" for name, value in (getattr(args, field) or {}).items()), 200)
    return f" ({options})" if options else ""


def _clip(args: Any) -> str:
    if args.clip_rule == "none":
        return "off"
    rule = _setting(args, "clip_rule") + _options(args, "clip_kwargs")
    if args.clip_rule in WITHOUT_RANGE:
        return rule
    if args.clip_rule in SEQUENCE_RANGE:
        return f"{rule}, a response's mean ratio from 1 - {number(args.low)} to 1 + {number(args.high)}"
    return f"{rule}, range [{number(1 - args.low)}, {number(1 + args.high)}]"


def _limit(args: Any, name: str, unit: str = "nats per token") -> str:
    return "off" if getattr(args, name) is None else f"{_setting(args, name)} {unit}"


def _hard_limits(args: Any) -> str:
    """Those that are on."""
    units = {"trust_max_kl": "nats per token", "trust_max_kl_token": "nats"}
    on = [name for name in HARD_LIMITS if getattr(args, name) is not None]
    return ", ".join(_limit(args, name, units.get(name, "nats per response")) for name in on) or "off"


def _setting(args: Any, name: str) -> str:
    value = getattr(args, name)
    return f"{name}={number(value) if isinstance(value, (int, float)) else shortened(str(value), 40)}"


def _target(link: str) -> str:
    """A relative link for use inside <>, which its characters cannot end."""
    return visible(link).replace("\\", "/").replace("<", "%3C").replace(">", "%3E").replace("\n", "%0A")
