"""Writes the parts of the documentation that the code knows best: options, metrics, formulas, the command line.

Between `<!-- generated: NAME -->` and `<!-- end -->` a page holds what the function NAME of `PARTS` returns. `make docs` runs
this; a test compares.

    python docs/generate.py            # rewrites the pages in place
    python docs/generate.py --check    # names those that would change, and exits with 1
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)

# Unit of every number of the configuration, and the value that switches a mechanism off ("" where there is none).
UNITS: dict[str, tuple[str, str]] = {
    "cliprange": ("1", '`clip_rule="none"`'),
    "cliprange_high": ("1", ""),
    "cliprange_value": ("the return's", "`clip_value=False`"),
    "clip_rule": ("", '`"none"`'),
    "clip_value": ("", "`False`"),
    "dataset_num_proc": ("processes", ""),
    "detach_value_head": ("", "`False`"),
    "gamma": ("1", ""),
    "grace_seconds": ("s", ""),
    "kl_coef": ("score per nat", "`0`"),
    "kl_controller": ("", '`"fixed"`'),
    "kl_horizon": ("responses", ""),
    "kl_offpolicy": ("", "`False`"),
    "kl_target": ("nats/response", "`None`"),
    "lam": ("1", ""),
    "learning_rate": ("1", ""),
    "local_rollout_forward_batch_size": ("prompts", ""),
    "max_grad_norm": ("1", "`0`"),
    "max_refused": ("updates", ""),
    "measure_fraction": ("share", ""),
    "missing_eos_penalty": ("the score's", "`None`"),
    "num_mini_batches": ("mini-batches", ""),
    "num_ppo_epochs": ("epochs", ""),
    "num_sample_generations": ("times", "`0`"),
    "panic_kl": ("nats/token", "`None`"),
    "response_length": ("tokens", ""),
    "reward_retries": ("times", "`0`"),
    "reward_weights": ("1", ""),
    "stop_token": ("", '`"none"`'),
    "stop_token_id": ("token id", "`None`"),
    "temperature": ("1", ""),
    "total_episodes": ("responses", ""),
    "trust_coef": ("advantage per nat", "`0`"),
    "trust_controller": ("", '`"fixed"`'),
    "trust_lr_target": ("nats/token", "`None`"),
    "trust_max_kl": ("nats/token", "`None`"),
    "trust_stop": ("nats/token", "`None`"),
    "trust_target": ("nats/token", "`None`"),
    "value_learning_rate": ("1", ""),
    "vf_coef": ("1", "`0`"),
    "whiten_advantages": ("", "`False`"),
    "whiten_rewards": ("", "`False`"),
}

# Fields of TRL's that belong to a section of ours.
_ANCHOR, _TRUST = ("kl_coef",), ("cliprange", "cliprange_value", "max_grad_norm")
# Fields that TRL's trainer computes, or that only TRL's own scripts read.
_COMPUTED = {
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size", "sft_model_path", "reward_model_path", "ds3_gather_for_generation",
}  # fmt: skip
_SECTIONS = {
    "The anchor, KL(π‖π_ref)": ("kl_",),
    "The trust region, KL(π_old‖π)": ("clip", "trust_", "max_grad"),
    "Advantages and values": ("whiten", "score_", "detach", "value_", "vf_", "gamma", "lam"),
    "Optimising, sampling, rewards, models": ("",),
    "When something goes wrong": ("panic", "max_refused", "reward_retries", "grace"),
}


# -- tables ------------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _default(value: dataclasses.Field[Any]) -> str:
    default = value.default_factory() if value.default_factory is not dataclasses.MISSING else value.default
    return f"`{getattr(default, 'value', default)!r}`" if not isinstance(default, str) else f'`"{default}"`'


def _first(text: str | None) -> str:
    """The first sentence."""
    return re.split(r"(?<=[a-z\d)`'])\. ", " ".join((text or "").split()), maxsplit=1)[0].rstrip(".").strip() + "."


# -- configuration -----------------------------------------------------------------------------------------------------


def config_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields this project documents itself: its own, and TRL's PPO ones as TRL 1.12 has them."""
    from transformers import TrainingArguments

    from trl_trustkl.ppo.config import TrustKLPPOConfig
    from trl_trustkl.trl_compat.ppo_base import PPOConfig

    common = {each.name for each in dataclasses.fields(TrainingArguments)} - {"learning_rate", "max_grad_norm"}
    trl = {each.name: each for each in dataclasses.fields(PPOConfig)}
    every = trl | {each.name: each for each in dataclasses.fields(TrustKLPPOConfig) if each.name not in trl}
    every["kl_estimator"], every["stop_token"] = (
        TrustKLPPOConfig.__dataclass_fields__[name] for name in ("kl_estimator", "stop_token")
    )
    return {name: each for name, each in every.items() if name not in common | _COMPUTED}


def section_of(name: str) -> str:
    fits = {title: prefix for title, prefixes in _SECTIONS.items() for prefix in prefixes if name.startswith(prefix)}
    return max(fits, key=lambda title: len(fits[title]))


def configuration() -> str:
    from trl_trustkl.ppo.config import TrustKLPPOConfig

    fields, hints = config_fields(), typing.get_type_hints(TrustKLPPOConfig)
    lacking = [name for name, each in fields.items() if _is_number(hints[name]) and name not in UNITS]
    unknown = [name for name in UNITS if name not in fields]
    if lacking or unknown:
        raise SystemExit(f"docs/generate.py: UNITS lacks {lacking} and has unknown {unknown}")
    parts = []
    for title in _SECTIONS:
        rows = [
            (f"`{name}`", _default(each), *UNITS.get(name, ("", "")), _meaning(each, hints[name]))
            for name, each in fields.items()
            if section_of(name) == title
        ]
        parts.append(f"## {title}\n\n" + table(("field", "default", "unit", "off", "meaning"), rows))
    return "\n".join(parts)


def _is_number(hint: Any) -> bool:
    return bool({int, float} & {hint, *typing.get_args(hint)})


def _meaning(field: dataclasses.Field[Any], hint: Any) -> str:
    help_text = str(field.metadata.get("help", ""))
    names = [name for part in (hint, *typing.get_args(hint)) for name in _literals(part)]
    listed = "" if all(name in help_text for name in names) else f" One of {', '.join(f'`{name}`' for name in names)}."
    return _cell(help_text.replace("ESTIMATORS", "the [estimators](mathematics.md#divergences)") + listed)


def _literals(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def inherited() -> str:
    """transformers' fields, as TRL sets their defaults."""
    from transformers import TrainingArguments

    from trl_trustkl.ppo.config import TrustKLPPOConfig

    own = config_fields()
    rows = [
        (f"`{each.name}`", _default(TrustKLPPOConfig.__dataclass_fields__[each.name]), _cell(_first(_help(each))))
        for each in dataclasses.fields(TrainingArguments)
        if each.name not in own
    ]
    return table(("field", "default", "meaning"), rows)


def _help(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("help") or "").replace("%%", "%")


def options() -> str:
    """What goes into the `*_kwargs`."""
    from trl_trustkl.controllers import CONTROLLERS
    from trl_trustkl.divergences import ESTIMATORS
    from trl_trustkl.surrogates import SURROGATES

    rows = []
    for name, cls in CONTROLLERS.items():
        given = [f for f in dataclasses.fields(cls) if f.name not in ("coef", "target")]
        rows.append(("`kl_controller`, `trust_controller`", f"`{name}`", ", ".join(map(_argument, given))))
    for field, entries in (("kl_estimator", ESTIMATORS), ("clip_rule", SURROGATES)):
        for name, function in entries.items():
            own = [
                f"`{p.name}` {p.default:g}"
                for p in inspect.signature(function).parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.name not in ("low", "high", "old_logp")
            ]
            if own:
                rows.append((f"`{field}`", f"`{name}`", ", ".join(own)))
    return table(("field", "name", "arguments, with their defaults"), rows)


def _argument(field: dataclasses.Field[Any]) -> str:
    needed = field.default is dataclasses.MISSING
    return f"`{field.name}` " + ("(needed)" if needed else f"{field.default:g}")


# -- metrics -----------------------------------------------------------------------------------------------------------


def meanings(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Each key of a record as trackers see it, with what its field is annotated with."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        nested = hasattr(hint, "_fields")
        found |= meanings(hint, f"{prefix}{name}/") if nested else {f"{prefix}{name}": hint.__metadata__[0]}
    return found


def _keys(schema: Any) -> str:
    rows = ((f"`{key}`", meaning.unit, _cell(meaning.text)) for key, meaning in meanings(schema).items())
    return table(("key", "unit", "meaning"), rows)


def record() -> str:
    from trl_trustkl.types import BoundRecord

    return _keys(BoundRecord)


def completions() -> str:
    from trl_trustkl.report.schema import Completion

    return _keys(Completion)


# -- mathematics: the first paragraph of each docstring is formula and source ------------------------------------------


def _formulas(module: str, entries: dict[str, Any]) -> str:
    rows = ((f"`{name}`", f"`{module}.{each.__name__}`", _formula(each)) for name, each in entries.items())
    return table(("name", "function", "formula and source"), rows)


def _formula(each: Any) -> str:
    return _cell((inspect.getdoc(each) or "").split("\n\n")[0])


def estimators() -> str:
    from trl_trustkl.divergences import ESTIMATORS

    return _formulas("divergences", ESTIMATORS)


def rules() -> str:
    from trl_trustkl.surrogates import SURROGATES

    return _formulas("surrogates", SURROGATES)


def controllers() -> str:
    from trl_trustkl.controllers import CONTROLLERS, LearningRateByKL

    return _formulas("controllers", {**CONTROLLERS, "`trust_lr_target`": LearningRateByKL}).replace("``", "`")


def gradients() -> str:
    from trl_trustkl.divergences import KLEstimatorName, Placement, gradient_kind

    placements = typing.get_args(Placement)
    names = typing.get_args(KLEstimatorName)
    rows = ((f"`{name}`", *(gradient_kind(name, placement) for placement in placements)) for name in names)
    return table(("`kl_estimator`", *(f'`"{placement}"`' for placement in placements)), rows)


def bounds() -> str:
    from trl_trustkl import bounds as module

    named = ("finite_horizon_tv_bound", "finite_horizon_sum_bound", "finite_horizon_bound", "masking_bound",
             "ratio_range_bounds", "trpo_penalty_coef")  # fmt: skip
    rows = ((f"`bounds.{name}`", _formula(getattr(module, name))) for name in named)
    return table(("function", "what it bounds"), rows)


def others() -> str:
    from trl_trustkl import advantages, bounds, divergences, trust_region

    functions = (
        divergences.exact, divergences.exact_from_logps, advantages.gae, advantages.anchor_rewards,
        advantages.place_scores, advantages.anchor_share, advantages.explained_variance, trust_region.measurement,
        trust_region.backtrack, bounds.guaranteed, bounds.binding,
    )  # fmt: skip
    rows = ((f"`{each.__module__.rpartition('.')[2]}.{each.__name__}`", _formula(each)) for each in functions)
    return table(("function", "what it computes"), rows)


def memory() -> str:
    with open(ROOT / "benchmarks" / "data" / "exact_kl_memory.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("mode", "backward", "allocator")
    peaks = {(each["tokens"], *(each[key] for key in keys)): f"{float(each['extra_mib']):,.0f}" for each in rows}
    cases = list(dict.fromkeys(tuple(each[key] for key in keys) for each in rows))
    head = ["tokens", *(_case(*case) for case in cases)]
    tokens = dict.fromkeys(each["tokens"] for each in rows)
    return table(head, ((each, *(peaks.get((each, *case), "") for case in cases)) for each in tokens))


def _case(mode: str, backward: str, allocator: str) -> str:
    passes = "forward and backward" if backward == "True" else "forward"
    return f"{mode}, {passes}, {allocator} allocator"


# -- the command line, and CONTRIBUTING.md ------------------------------------------------------------------------------


def commands() -> str:
    os.environ["COLUMNS"] = "80"
    words: list[list[str]] = [[], ["demo"], ["train"], ["report"], ["compare"]]
    parts = [f"## `{' '.join(['trustkl', *each])}`\n\n```text\n{_printed([*each, '--help'])}```\n" for each in words]
    return "\n".join(parts)


def _printed(arguments: list[str]) -> str:
    from trl_trustkl.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(arguments)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M).rstrip() + "\n"


def contributing() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\n")[2].lstrip()
    return re.sub(r"\]\((?!http|#|docs/)", "](../", text).replace("](docs/", "](")


PARTS: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (
        configuration, inherited, options, record, completions, estimators, rules,
        controllers, gradients, bounds, others, memory, commands, contributing,
    )
}  # fmt: skip


def generated(text: str) -> str:
    """A page with its generated parts made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    return [path for path in sorted(DOCS.glob("*.md")) if _BLOCK.search(path.read_text("utf-8"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        old = page.read_text("utf-8")
        if (new := generated(old)) != old:
            stale.append(page.name)
            if not check:
                page.write_text(new, "utf-8")
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
