"""Compare the documentation with the code: generated parts are up to date, names exist, and code examples are valid."""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import doctest
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import trl_trustkl
from tests import tiny
from tests.pinned import on_pinned_transformers
from trl_trustkl.controllers import CONTROLLERS, PIDKL, AdaptiveKL
from trl_trustkl.divergences import ESTIMATORS, EXACT, exact, k1, k3
from trl_trustkl.errors import TrustKLError
from trl_trustkl.ppo.config import TrustKLPPOConfig
from trl_trustkl.records import BoundRecord, load_records
from trl_trustkl.report.findings import FINDINGS
from trl_trustkl.report.schema import Completion
from trl_trustkl.surrogates import SURROGATES, ppo
from trl_trustkl.trl_compat.version import PPOConfig
from trl_trustkl.trust_region import backtrack

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
FIELDS = {each.name for each in dataclasses.fields(TrustKLPPOConfig)}
NEWEST = PPOConfig.__module__.startswith("trl_trustkl")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("docs/generate.py")


def modules_with_examples() -> list[str]:
    """The modules of the package that have a `>>>` in their source."""
    sources = sorted((ROOT / "trl_trustkl").rglob("*.py"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources if ">>> " in path.read_text("utf-8")
    ]


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language with their pages, except in pages whose blocks are printed by a program."""
    pattern = re.compile(rf"^ *```{language}\n(.*?)^ *```", re.S | re.M)
    return [(page, block) for page, text in TEXTS.items() if page != "docs/cli.md" for block in pattern.findall(text)]


# -- the API reference -------------------------------------------------------------------------------------------------


def test_the_api_pages_have_all_public_names_and_only_names_that_exist() -> None:
    named = {
        name
        for page in ("api", "api_mathematics")
        for name in re.findall(r"^::: (\S+)$", TEXTS[f"docs/{page}.md"], re.M)
    }
    assert {f"trl_trustkl.{name}" for name in trl_trustkl.__all__} <= named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


def test_the_examples_of_docstrings_are_code_on_the_api_pages() -> None:
    pytest.importorskip("griffe")
    fenced = load("docs/doctests.py").fenced
    assert fenced("Says.\n\n>>> f(\n...     1)\n2\n>>> g()\n\nMore.") == (
        "Says.\n\n```pycon\n>>> f(\n...     1)\n2\n>>> g()\n```\n\nMore."
    )
    assert fenced("A text without any.") == "A text without any."


def test_formulas_become_mathml() -> None:
    pytest.importorskip("mkdocs")
    hooks = load("docs/hooks.py")
    formulas = [
        (page, each) for page, text in TEXTS.items() for each in re.findall(r"^```math\n.*?^```$", text, re.M | re.S)
    ]
    assert formulas
    for page, block in formulas:
        made = hooks.on_page_markdown(block)
        assert made.startswith('<div class="formula"><math') and "\\" not in made and "&</mi>" not in made, (
            page,
            block,
        )


# -- generated parts ---------------------------------------------------------------------------------------------------


@on_pinned_transformers("The pages quote its help texts.")
@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.stem)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    if page.stem == "cli" and not NEWEST:
        pytest.skip("the options of `trustkl train` are those of the newest TRL")
    text = page.read_text("utf-8")
    assert generate.generated(text) == text, "make docs"


def test_every_key_of_a_record_has_a_meaning_and_none_is_left_over() -> None:
    assert list(keys_of(BoundRecord)) == documented("The record")
    assert list(Completion._fields) == documented("Completions")


def keys_of(schema: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a record; one that may be null has its own key and those of its fields."""
    for name, hint in typing.get_type_hints(schema).items():
        if not hasattr(hint, "_fields"):
            yield prefix + name
        for kind in (hint, *typing.get_args(hint)):
            if hasattr(kind, "_fields"):
                yield from keys_of(kind, f"{prefix}{name}/")


def documented(section: str) -> list[str]:
    """The keys that a section of docs/metrics.md has a row for."""
    (text,) = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", TEXTS["docs/metrics.md"], re.M | re.S)
    return re.findall(r"^\| `([\w/]+)` \|", text, re.M)


def test_every_metric_that_is_logged_has_a_meaning() -> None:
    from trl_trustkl.trl_compat import trl_logs as stock

    source = (ROOT / "trl_trustkl/ppo/recording.py").read_text("utf-8")
    (function,) = (
        node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "metrics"
    )  # fmt: skip
    (returned,) = (node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    logged = [key.value for key in returned.keys if key is not None]
    assert logged == documented("TRL's names")
    assert documented("Metrics of `AdaptiveKLCallback`") == [stock.KL, stock.TARGET, stock.COEF]


def test_every_finding_has_its_section_in_order() -> None:
    assert re.findall(r"^## .*\(`(\w+)`\)$", TEXTS["docs/troubleshooting.md"], re.M) == list(FINDINGS)


def errors_of(folder: Path) -> list[Any]:
    """Functions that raise each error of the troubleshooting table, in its order; None for errors that other tests raise."""
    quantised = tiny.llama()
    quantised.is_loaded_in_4bit = True
    anchor = {"kl_estimator": "k1", "kl_placement": "loss"}
    return [
        lambda: TrustKLPPOConfig(output_dir=str(folder), bf16=True),
        lambda: tiny.config(folder, num_mini_batches=3),
        lambda: tiny.trainer(folder, train_dataset=tiny.prompts(4)),
        lambda: tiny.config(folder, kl_controller="adaptive"),
        lambda: tiny.config(folder, kl_target=6.0),
        lambda: tiny.config(folder, **anchor),
        lambda: tiny.config(folder, trust_max_kl=0.1, measure_fraction=0.5),
        lambda: tiny.trainer(folder, peft_config=tiny.lora(init_lora_weights=False)),
        lambda: tiny.trainer(folder, quantised, peft_config=None),
        lambda: tiny.trainer(folder, processing_class=None),
        lambda: tiny.trainer(
            folder, processing_class=tiny.tokenizer(chat=False), train_dataset=tiny.prompts(chat=True)
        ),
        lambda: tiny.config(folder, deepspeed="zero3.json"),
        None,  # test_report.py
        None,  # test_resume.py
    ]


def test_the_errors_of_the_troubleshooting_table_are_raised(tmp_path: Path) -> None:
    (table,) = re.findall(r"^\| it says \|.*\n\|.*\n((?:\|.*\n)+)", TEXTS["docs/troubleshooting.md"], re.M)
    quotes = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    for quote, provoke in zip(quotes, errors_of(tmp_path), strict=True):
        if provoke is None or ("bf16" in quote and torch.cuda.is_available()):
            continue
        with pytest.raises(TrustKLError) as error:
            provoke()
        said = ".*".join(re.escape(part.strip()) for part in quote.split("…"))
        assert re.search(said, str(error.value)), f"{quote!r} is not in: {error.value}"


# -- names -------------------------------------------------------------------------------------------------------------


def test_public_names_are_documented() -> None:
    text = "\n".join(TEXTS.values())
    names = {*trl_trustkl.__all__, *ESTIMATORS, *EXACT, *CONTROLLERS, *SURROGATES, *generate.config_fields()}
    assert [name for name in sorted(names) if not re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_settings_named_in_the_text_are_settings() -> None:
    """`field=value` in code style."""
    others = {
        "use_cpu", "reward_model", "reward_funcs", "value_model", "ref_model", "peft_config", "callbacks",
        "resume_from_checkpoint", "init_lora_weights", "adap_kl_ctrl", "kl_penalty", "early_stopping", "weights_only",
        "beta", "num_iterations", "steps_per_generation", "every", "max_kl",
    }  # fmt: skip
    wrong = []
    for page, text in TEXTS.items():
        for name in re.findall(r"`([a-z_]+)=[^`]+`", text):
            if name not in FIELDS | others:
                wrong.append(f"{page}: {name}")
    assert wrong == []


def test_keys_of_a_record_named_in_the_text_are_keys() -> None:
    sections = ("The record", "TRL's names", "Metrics of `AdaptiveKLCallback`")
    known = {key for section in sections for key in documented(section)}
    groups = {key.split("/")[0] for key in documented("The record") if "/" in key}
    found = [
        (page, key.replace(".", "/"))
        for page, text in TEXTS.items()
        for key in re.findall(rf"`((?:{'|'.join(groups)})[./]\w+)`", text)
    ]
    assert len(found) > 30
    assert [(page, key) for page, key in found if key not in known and not key.endswith(("/py", "/json"))] == []


# -- code and commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: str(value)[:24])
def test_python_blocks_are_valid_and_name_what_exists(page: str, code: str) -> None:
    tree = ast.parse(re.sub(r"^ {4}", "", code, flags=re.M) if code.startswith("    ") else code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module
        if isinstance(node, ast.Call):
            known = known_arguments(getattr(node.func, "id", ""))
            given = {word.arg for word in node.keywords if word.arg}
            assert known is None or given <= known, f"{page}: {given - (known or set())}"


def known_arguments(name: str) -> set[str] | None:
    import inspect

    import trl

    if name.endswith("Config") and hasattr(trl, name):
        return {each.name for each in dataclasses.fields(getattr(trl, name))}
    if name == "TrustKLPPOConfig":
        return FIELDS
    if name in ("TrustKLPPOTrainer", "BoundReportCallback", "AdaptiveKLCallback"):
        return set(inspect.signature(getattr(trl_trustkl, name).__init__).parameters)
    if name in {cls.__name__ for cls in CONTROLLERS.values()}:
        return {each.name for cls in CONTROLLERS.values() if cls.__name__ == name for each in dataclasses.fields(cls)}
    return None


def commands() -> list[tuple[str, str]]:
    """Every line of a shell block, and every command in code style, without comments and prompts."""
    lines = [(page, line) for page, block in blocks("(?:sh|bash|console)?") for line in block.splitlines()]
    lines += [
        (page, each)
        for page, text in TEXTS.items()
        for each in re.findall(r"`((?:python|trustkl|make) [^`\n]+)`", text)
    ]
    return [(page, re.split(r"  +#| # ", line)[0].strip()) for page, line in lines]


def known_flags(words: list[str]) -> set[str]:
    """The options of the command that the words begin with."""

    if words[:2] == ["trustkl", "train"]:
        from trl_trustkl.cli.train_options import build_parser

        parser = build_parser(words[words.index("--trainer") + 1] if "--trainer" in words else "ppo")
        return {option for action in parser._actions for option in action.option_strings} | {"--config"}
    if words[0] == "trustkl":
        return set(re.findall(r"--[a-z][\w-]*", generate._printed([*words[1:2], "--help"])))
    source = (ROOT / words[1]).read_text("utf-8")
    own = set(re.findall(r"--[a-z][\w-]*", source)) | {
        f"--{name}" for name in re.findall(r'"([a-z]+-?[a-z]+)"', source)
    }
    return own | (known_flags(["trustkl", "compare"]) if "four_corners" in words[1] else set())


def test_commands_and_their_flags_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    seen = 0
    for page, line in commands():
        line = line.replace("accelerate launch --multi_gpu --num_processes 2 -m trl_trustkl", "trustkl")
        with contextlib.suppress(ValueError):
            words = shlex.split(line)
            if words[:1] == ["make"]:
                named = [word for word in words[1:] if re.fullmatch(r"[a-z0-9-]+", word)]
                assert set(named) <= targets, f"{page}: {line}"
            elif words[:1] == ["trustkl"] or (words[:1] == ["python"] and words[1].endswith(".py")):
                flags = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
                assert flags <= known_flags(words) | {"--help", "--version"}, f"{page}: {line}"
            else:
                continue
            seen += 1
    assert seen > 20


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: str(value)[:24])
def test_yaml_blocks_are_valid_and_name_options(page: str, text: str) -> None:
    from trl_trustkl.cli.train_options import dataclasses_of

    known = {each.name for cls in dataclasses_of("ppo") for each in dataclasses.fields(cls)}
    assert set(yaml.safe_load(text)) <= known, page


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_run(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted > 0


@pytest.mark.parametrize(
    "shown",
    [k1, k3, exact, AdaptiveKL, PIDKL, ppo, backtrack, load_records, TrustKLPPOConfig],
    ids=lambda shown: shown.__name__,
)
def test_the_main_classes_and_functions_have_a_tested_example(shown: Any) -> None:
    assert doctest.DocTestParser().get_examples(shown.__doc__)
    assert shown.__module__ in modules_with_examples()


# -- links and figures -------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that a forge and MkDocs both give to the headings: MkDocs drops every letter that is not ASCII."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {heading.replace(" ", "-") for heading in plain if heading.isascii() and "  " not in heading}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        place = page.parent / target if target else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place.read_text("utf-8")), link


def test_figures_and_tables_exist_and_are_made_by_a_command_on_the_page() -> None:
    for page, text in TEXTS.items():
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
        for figure in shown:
            name = re.sub(r"_(kl|ratio|light|dark)$", "", Path(figure).stem)
            name = re.sub(r"^study_.*", "study", name)
            assert ((ROOT / page).parent / figure).exists(), f"{page}: {figure}"
            scripts = (f"examples/{name}.py", f"benchmarks/{name}.py", "docs/screenshots.py")
            made = [script for script in scripts if (ROOT / script).exists() and f"python {script}" in text]
            assert made, f"{page}: {figure}"
        for table in re.findall(r'--8<-- "([^"]+)"', text):
            name = re.sub(r"_(avx2|h100)$", "", Path(table).stem)
            assert f"python benchmarks/{name}.py" in text, f"{page}: {table}"
            assert (ROOT / table).exists(), f"{page}: {table}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outside = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//'
    )
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert len(pages) > 15 and [page.name for page in pages if outside.search(page.read_text("utf-8"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for page, code in blocks("python") if page == "README.md"])
def test_the_snippets_of_the_readme_train(code: str, tmp_path: Path) -> None:
    """As written, but with the model's files in place of its name on the Hub."""
    from trl_trustkl.demo.smollm2 import smollm2_path

    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2_path())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(load_records(tmp_path / "run")) == 5


def measured(name: str) -> str:
    return (ROOT / "benchmarks" / "data" / name).read_text("utf-8")


def test_the_comparison_with_trl_in_the_readme_is_that_of_the_benchmark() -> None:
    found = measured("vs_stock_ppo.md")
    ((low, high),) = re.findall(r"- \*recommended\*: [\d.]+ × faster .* \(([\d.]+) to ([\d.]+) over", found)
    (less,) = re.findall(r"- \*recommended\*: ([\d.]+) × less memory", found)
    ends = " to ".join(dict.fromkeys(f"{float(end):.1f}" for end in (low, high)))
    said = f"was {ends} times faster than that of TRL 1.12's trainer, in {float(less):.1f} times less memory"
    assert said in " ".join(TEXTS["README.md"].split())


def test_the_cost_of_measuring_in_the_readme_is_that_of_the_benchmark() -> None:
    rows = [row.split(" | ") for row in measured("overhead.md").splitlines() if re.match(r"\| \d", row)]
    totals = {(row[0].strip("| "), row[1]): float(row[7].rstrip("%")) for row in rows}
    two, four, cheap = totals["2", "1"], totals["4", "1"], totals["2", "0.25"]
    said = f"{two:.1f} % of an update of the demo at 2 epochs, {four:.1f} % at 4, and {cheap:.1f} % with"
    assert said in " ".join(TEXTS["README.md"].split())


def test_the_four_corners_in_the_text_are_those_of_the_benchmark() -> None:
    for row in csv.DictReader(measured("four_corners.csv").splitlines()):
        number = {key: float(value) for key, value in row.items() if key != "setting"}
        score = f"{number['score_first']:.2f} → {number['score']:.2f}"
        ratio, likelihood = f"{number['ratio']:,.0f}", f"{number['ref_logp']:.2f}"
        complete = (
            f"{number['kl']:.1f}",
            f"{number['update_kl']:.3f}",
            ratio,
            likelihood,
            f"{number['distinct_2']:.2f}",
        )
        assert f"| {row['setting']} | {score} | {' | '.join(complete)} |" in TEXTS["docs/kl_or_trust_region.md"]
        assert ratio in TEXTS["README.md"] or "clip" not in row["setting"]
