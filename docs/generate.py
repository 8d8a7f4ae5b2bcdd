"""Generate the parts of the documentation that are derived from the code: options, metrics, formulas, the command line.

Between `<!-- generated: NAME -->` and `<!-- end -->` a page has the output of the function NAME in `PARTS`. `make docs` runs
this script, and a test checks that the pages are up to date.

    python docs/generate.py            # rewrites the pages in place
    python docs/generate.py --check    # prints the pages that would change, and then exits with status 1
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
import runpy
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)

# The sections of the configuration: titles by the groups of `TrustKLPPOConfig`.
_SECTIONS = {
    "anchor": "The anchor, KL(π‖π_ref)",
    "trust region": "The trust region, KL(π_old‖π)",
    "advantages and values": "Advantages and values",
    "optimising, sampling, rewards, models": "Optimising, sampling, rewards, models",
    "rollouts by vLLM": "Rollouts by vLLM",
    "when something goes wrong": "When something goes wrong",
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
    """The fields that this package documents: its own fields and those of TRL's PPO."""
    from trl_trustkl.options import about
    from trl_trustkl.ppo.config import TrustKLPPOConfig

    return {each.name: each for each in dataclasses.fields(TrustKLPPOConfig) if about(each).group}


def configuration() -> str:
    from trl_trustkl.options import about
    from trl_trustkl.ppo.config import TrustKLPPOConfig

    fields, hints = config_fields(), typing.get_type_hints(TrustKLPPOConfig)
    rows: dict[str, list[Iterable[str]]] = {group: [] for group in _SECTIONS}
    for name, each in fields.items():
        own = about(each)
        if _is_number(hints[name]) and not own.unit:
            raise SystemExit(f"docs/generate.py: `{name}` has no unit")
        off = own.off and f"`{own.off}`"
        rows[own.group].append((f"`{name}`", _default(each), own.unit, off, _meaning(each, hints[name])))
    head = ("field", "default", "unit", "off", "meaning")
    return "\n".join(f"## {title}\n\n{table(head, rows[group])}" for group, title in _SECTIONS.items())


def trl_configuration() -> str:
    """The fields that are added to TRL's configurations of GRPO and RLOO."""
    from trl_trustkl.grpo.config import TrustRegionFields
    from trl_trustkl.options import about

    hints = typing.get_type_hints(TrustRegionFields)
    rows = [
        (
            f"`{each.name}`",
            _default(each),
            about(each).unit,
            about(each).off and f"`{about(each).off}`",
            _meaning(each, hints[each.name]),
        )
        for each in dataclasses.fields(TrustRegionFields)
    ]
    return table(("field", "default", "unit", "off", "meaning"), rows)


def engine_example() -> str:
    """The engine of examples/custom_engine.py."""
    code = (ROOT / "examples" / "custom_engine.py").read_text("utf-8")
    return f"```python\n{code.partition('# docs: begin')[2].partition('# docs: end')[0].strip()}\n```\n"


def sharded_memory() -> str:
    """The peaks that examples/sharded_memory.py counts."""
    example = runpy.run_path(str(ROOT / "examples" / "sharded_memory.py"))
    rows, counts = [], (2, 4, 8)
    for title, rank in (("LoRA, r = 16", 16), ("full fine-tuning", None)):
        shape = example["shapes"](example["LLAMA_8B"], rank)
        for engine in example["ENGINES"]:
            held = [example["held"](engine, shape, count, full=rank is None) for count in counts]
            ways = [(engine, True)]
            if engine in ("FSDP2", "ZeRO-3"):
                ways.append((f"{engine}, sampling layer by layer", False))
            for name, gathers in ways:
                sums = [example["peak"](each, gathers=gathers) for each in held]
                rows.append((title, name, *(f"{each / 1e9:.0f}" for each in sums)))
    return table(("", "engine", *(f"{count} GPUs" for count in counts)), rows)


def vllm_measured() -> str:
    """What benchmarks/vllm_rollouts.py measured."""
    found = {}
    for part in ("speed", "runs"):
        with open(ROOT / "benchmarks" / "data" / f"vllm_{part}.csv", encoding="utf-8") as file:
            found[part] = list(csv.DictReader(file))
    speed, runs = found["speed"], found["runs"]
    found_rates = {(r["engine"], r["policy"], r["dtype"], r["batch"]): float(r["tokens_per_second"]) for r in speed}
    sending = {(r["engine"], r["policy"], r["dtype"]): float(r["sync_seconds"]) for r in speed}
    engines, batches = ("transformers", "colocate", "server"), ("16", "64")
    rates = table(
        ("policy", "dtype", *(f"{engine}, {batch}" for engine in engines for batch in batches),
         *(f"{engine}, sending" for engine in engines[1:])),
        (
            (policy, dtype, *(f"{found_rates[engine, policy, dtype, batch]:.0f}" for engine in engines for batch in batches),
             *(f"{sending[engine, policy, dtype]:.1f} s" for engine in engines[1:]))
            for policy, dtype in dict.fromkeys((r["policy"], r["dtype"]) for r in speed)
        ),
    )  # fmt: skip
    complete = table(
        ("engine", "policy", "dtype", "updates", "largest `sampler/kl`", "π_old/μ", "largest KL(π_old‖π) by float64",
         "above the limit", "score, first and last third"),
        (
            (r["engine"], r["policy"], r["dtype"], r["updates"], f"{float(r['largest_sampler_kl']):.1e}",
             f"{float(r['smallest_ratio']):.4f} to {float(r['largest_ratio']):.4f}", f"{float(r['largest_dense_kl']):.4f}",
             r["over_the_limit"], f"{float(r['first_scores']):+.2f} → {float(r['last_scores']):+.2f}")
            for r in runs
        ),
    )  # fmt: skip
    return (
        f"Tokens per second for 16 and for 64 prompts, responses of {speed[0]['tokens']} tokens, and seconds of sending the "
        f"weights (`benchmarks/vllm_rollouts.py speed`; SmolLM2-135M, vLLM 0.31; {speed[0]['machine']}):\n\n{rates}\n"
        "Complete runs with a limit of 0.02 on KL(π_old‖π), 16 responses an update, one seed "
        f"(`benchmarks/vllm_rollouts.py runs`):\n\n{complete}"
    )


def _is_number(hint: Any) -> bool:
    return bool({int, float} & {hint, *typing.get_args(hint)})


def _meaning(field: dataclasses.Field[Any], hint: Any) -> str:
    help_text = str(field.metadata.get("help", ""))
    names = [name for part in (hint, *typing.get_args(hint)) for name in _literals(part)]
    listed = "" if all(name in help_text for name in names) else f" One of {', '.join(f'`{name}`' for name in names)}."
    help_text = help_text.replace("Estimator of the KL", "[Estimator](mathematics.md#divergences) of the KL")
    return _cell(help_text + listed)


def _literals(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def inherited() -> str:
    """The fields of transformers that have an effect, with TRL's defaults."""
    from transformers import TrainingArguments

    from trl_trustkl.ppo.config import TrustKLPPOConfig
    from trl_trustkl.ppo.unsupported import REJECTED
    from trl_trustkl.trl_compat.unused_fields import WITHOUT_EFFECT

    own = {*config_fields(), *REJECTED, "fsdp", "deepspeed", *WITHOUT_EFFECT}
    rows = [
        (f"`{each.name}`", _default(TrustKLPPOConfig.__dataclass_fields__[each.name]), _cell(_first(_help(each))))
        for each in dataclasses.fields(TrainingArguments)
        if each.name not in own
    ]
    return table(("field", "default", "meaning"), rows)


def rejected() -> str:
    """The fields that accept only what turns them off."""
    from trl_trustkl.ppo.unsupported import REJECTED

    return _reasons(REJECTED)


def unused() -> str:
    """The fields of transformers and TRL that have no effect."""
    from trl_trustkl.trl_compat.unused_fields import WITHOUT_EFFECT

    return _reasons(WITHOUT_EFFECT)


def _reasons(reasons: dict[str, str]) -> str:
    """One row for each reason and the fields that exist in the installed versions."""
    from trl_trustkl.ppo.config import TrustKLPPOConfig

    fields: dict[str, list[str]] = {}
    for name, why in reasons.items():
        if name in TrustKLPPOConfig.__dataclass_fields__:
            fields.setdefault(why, []).append(f"`{name}`")
    return table(("field", "why"), ((", ".join(names), _cell(why)) for why, names in fields.items()))


def _help(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("help") or "").replace("%%", "%")


def options() -> str:
    """The arguments in the `*_kwargs` fields."""
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
                if p.kind is p.KEYWORD_ONLY and p.name not in ("low", "high", "old_logp", "projection")
            ]
            if own:
                rows.append((f"`{field}`", f"`{name}`", ", ".join(own)))
    return table(("field", "name", "arguments, with their defaults"), rows)


def _argument(field: dataclasses.Field[Any]) -> str:
    needed = field.default is dataclasses.MISSING
    return f"`{field.name}` " + ("(needed)" if needed else f"{field.default:g}")


# -- metrics -----------------------------------------------------------------------------------------------------------


def meanings(schema: Any, prefix: str = "") -> dict[str, Any]:
    """The keys of a record as they are logged to trackers, with the annotations of their fields."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        if hasattr(hint, "__metadata__"):
            found[f"{prefix}{name}"] = hint.__metadata__[0]
        kinds = (hint, *typing.get_args(getattr(hint, "__origin__", None)))
        for nested in (kind for kind in kinds if hasattr(kind, "_fields")):  # a record, or one that may be null
            found |= meanings(nested, f"{prefix}{name}/")
    return found


def _keys(schema: Any) -> str:
    rows = ((f"`{key}`", meaning.unit, _cell(meaning.text)) for key, meaning in meanings(schema).items())
    return table(("key", "unit", "meaning"), rows)


def record() -> str:
    from trl_trustkl.records import BoundRecord

    return _keys(BoundRecord)


def completions() -> str:
    from trl_trustkl.report.schema import Completion

    return _keys(Completion)


# -- mathematics: the first paragraph of each docstring has the formula and its source ---------------------------------


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
             "error_bounds", "ratio_range_bounds", "trpo_penalty_coef")  # fmt: skip
    rows = ((f"`bounds.{name}`", _formula(getattr(module, name))) for name in named)
    return table(("function", "what it bounds"), rows)


def others() -> str:
    from trl_trustkl import advantages, bounds, certificate, divergences, importance, trust_region

    functions = (
        divergences.exact, divergences.exact_from_logps, advantages.gae, advantages.group_advantages,
        advantages.less_group_mean, advantages.less_mean_of_others, advantages.anchor_rewards,
        advantages.place_scores, advantages.anchor_share, advantages.explained_variance, importance.importance_weights,
        trust_region.measurement, trust_region.backtrack, bounds.guarantees, bounds.binding, certificate.certificate,
    )  # fmt: skip
    public = {trust_region.measurement: "trust_region", trust_region.backtrack: "trust_region"}
    rows = (
        (f"`{public.get(each, each.__module__.rpartition('.')[2])}.{each.__name__}`", _formula(each))
        for each in functions
    )
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
        configuration, trl_configuration, inherited, rejected, unused, options, record, completions, estimators, rules,
        controllers, gradients, bounds, others, memory, commands, contributing, engine_example, vllm_measured,
        sharded_memory,
    )
}  # fmt: skip


def generated(text: str) -> str:
    """A page with its generated parts updated."""
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
