"""The structure of the code, read from its source: sizes, the direction of imports, private names, and unused names.

Each rule is a function from sources to its violations, so that the tests below can also show that each rule fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "trl_trustkl"
LONGEST_FUNCTION, LARGEST_MODULE, LARGEST_TEST_FILE = 60, 400, 499  # lines
ABOUT_THE_PROJECT = {
    "test_docs",
    "test_examples",
    "test_packaging",
    "test_recipes",
    "test_structure",
    "test_typings",
    "test_upstream_defects",
}
"""Test files at the top that belong to no module."""

LAYERS = (
    ("errors", "files", "import_paths", "types"),
    (
        "advantages",
        "bounds",
        "certificate",
        "controllers",
        "divergences",
        "importance",
        "kl_ball",
        "masking",
        "options",
        "records",
        "surrogates",
    ),
    ("trl_compat",),
    ("parallel", "policy"),
    ("report", "rollout", "run", "trust", "trust_region"),
    ("callbacks",),
    ("ppo", "grpo"),
    ("compare",),
    ("cli", "demo", "__main__"),
)
"""From the bottom up, as docs/design.md has them: a module imports from its own layer and from those before it. The
package's own `__init__`, which loads what is above the mathematics on first use, is in none."""

UNNAMED_ON_PURPOSE = {
    "cli.parser._check_value": "argparse calls it",
    "cli.train_help._get_help_string": "argparse calls it",
    "trl_compat.vllm.check_server": "TRL calls it",
}
"""What breaks a rule, and why it does."""


class Source(NamedTuple):
    text: str
    tree: ast.Module
    is_package: bool


class Import(NamedTuple):
    """`name` of `target`, a module of the package, in `module`; None where the module itself is imported."""

    module: str
    target: str
    name: str | None


@cache
def package() -> dict[str, Source]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return parsed({str(path.relative_to(ROOT / PACKAGE)): path.read_text(encoding="utf-8") for path in paths})


def parsed(files: Mapping[str, str]) -> dict[str, Source]:
    """Modules by their dotted names inside the package; "" is the package's own `__init__`."""
    sources = {}
    for path, text in files.items():
        parts = Path(path).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        sources[".".join(parts[:-1] if is_package else parts)] = Source(text, ast.parse(text), is_package)
    return sources


def everything_else() -> Iterator[Path]:
    """The files that may name what the package defines, other than its modules and this test."""
    for folder, endings in (("tests", "py"), ("examples", "py ipynb yaml"), ("benchmarks", "py"), ("docs", "py md")):
        for ending in endings.split():
            yield from (path for path in (ROOT / folder).rglob(f"*.{ending}") if path != Path(__file__))
    yield from (ROOT / PACKAGE).rglob("*.html")
    yield from (ROOT / "README.md", ROOT / "pyproject.toml")


# -- the rules ---------------------------------------------------------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function and method, signature and docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.end_lineno - node.lineno + 1, node.name


def too_long(texts: Mapping[str, str]) -> list[str]:
    return [
        f"{path}: {name} has {lines} lines"
        for path, text in texts.items()
        for lines, name in functions(ast.parse(text))
        if lines > LONGEST_FUNCTION
    ]


def too_large(sources: Mapping[str, Source]) -> list[str]:
    lines = lines_of_modules(sources)
    return [f"{module} has {count} lines" for module, count in lines.items() if count > LARGEST_MODULE]


def lines_of_modules(sources: Mapping[str, Source]) -> dict[str, int]:
    return {module: len(source.text.splitlines()) for module, source in sources.items()}


def imports(sources: Mapping[str, Source]) -> Iterator[Import]:
    """What the modules import of each other: at their top, under TYPE_CHECKING or inside a function."""
    for module, source in sources.items():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
                yield from (Import(module, name.removeprefix(PACKAGE).lstrip("."), None) for name in names)
            elif isinstance(node, ast.ImportFrom):
                base = _resolved(node, module, source.is_package)
                for alias in node.names if base is not None else ():
                    inside = f"{base}.{alias.name}".lstrip(".")
                    yield Import(module, inside, None) if inside in sources else Import(module, base, alias.name)


def _resolved(node: ast.ImportFrom, module: str, is_package: bool) -> str | None:
    """The module of this package that is imported from; None for any other."""
    if not node.level:
        top, _, rest = (node.module or "").partition(".")
        return rest if top == PACKAGE else None
    parts = [part for part in module.split(".") if part]
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def layer(module: str) -> int | None:
    """The number of a module's layer; None for one that is in none."""
    fitting = [
        (len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")
    ]
    return max(fitting)[1] if fitting else None


def upward(found: list[Import]) -> list[str]:
    """Imports of a higher layer, and modules that have no layer."""
    wrong = [
        f"{module} is in no layer" for module in {each.module for each in found} if module and layer(module) is None
    ]
    for each in found:
        own, other = layer(each.module), layer(each.target)
        if own is not None and other is not None and other > own:
            wrong.append(f"{each.module} imports {each.target}, which is above it")
    return wrong


def cycle(found: list[Import]) -> list[str]:
    """The modules of a circle of imports; none where there is no circle."""
    graph: dict[str, set[str]] = {}
    for each in found:
        graph.setdefault(each.module, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def private(found: list[Import]) -> list[str]:
    """Imports of another module's underscored names, or of an underscored module by another package's."""
    wrong = []
    for each in found:
        folder, _, last = each.target.rpartition(".")
        hidden = each.name is not None and each.name.startswith("_") and not each.name.startswith("__")
        if hidden or (last.startswith("_") and not f"{each.module}.".startswith(f"{folder}.")):
            wrong.append(f"{each.module} imports {each.name or 'the module'} of {each.target}")
    return wrong


def definitions(tree: ast.Module) -> Iterator[str]:
    """The names that a module defines: functions, classes, methods, fields and module-level constants."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for statement in node.body:
                targets = (
                    statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                )
                yield from (name.id for target in targets if target for name in ast.walk(target) if _is_new(name))


def _is_new(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def names(tree: ast.Module) -> Iterator[str]:
    """The names that a module uses: read, imported, given as a keyword, or spelled in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
            yield from re.findall(r"\w+", node.value)


def unused(sources: Mapping[str, Source], elsewhere: set[str]) -> list[str]:
    """module.name of what is defined and never named again."""
    used = elsewhere.union(*(names(source.tree) for source in sources.values()))
    return [
        f"{module}.{name}"
        for module, source in sources.items()
        for name in definitions(source.tree)
        if name not in used and not name.startswith("__")
    ]


def file_of_tests(module: str, source: Source) -> str | None:
    """The path of the test file of a module; None for an `__init__` that defines nothing."""
    *folder, name = module.split(".") if module else [""]
    if source.is_package:
        if not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in source.tree.body):
            return None
        folder, name = ([*folder, name] if name else []), "init"
    return "/".join([*folder, f"test_{name.strip('_')}.py"])


def without_tests(sources: Mapping[str, Source], tests: Mapping[str, str]) -> list[str]:
    """Modules whose test file is missing or holds no test; `tests` are texts by their paths in tests/."""
    wanted = {module: file_of_tests(module, source) for module, source in sources.items()}
    return [module for module, path in wanted.items() if path and "def test_" not in tests.get(path, "")]


def misfiled(sources: Mapping[str, Source], tests: Mapping[str, str]) -> list[str]:
    """Test files that belong to no module: tests of one topic of a module are in `test_<module>_<topic>.py`."""
    starts = [path.removesuffix(".py") for module, source in sources.items() if (path := file_of_tests(module, source))]
    return [
        path
        for path in tests
        if Path(path).name.startswith("test_")
        and not path.startswith("end_to_end/")
        and path.removesuffix(".py") not in ABOUT_THE_PROJECT
        and not any(f"{path.removesuffix('.py')}_".startswith(f"{start}_") for start in starts)
    ]


# -- the package -------------------------------------------------------------------------------------------------------


@cache
def found_imports() -> list[Import]:
    return list(imports(package()))


@cache
def all_test_files() -> dict[str, str]:
    folder = ROOT / "tests"
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


@pytest.mark.parametrize("folder", [PACKAGE, "tests", "examples", "benchmarks", "docs"])
def test_no_function_is_too_long(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths and too_long({str(path): path.read_text(encoding="utf-8") for path in paths}) == []


def test_no_module_is_too_large():
    assert too_large(package()) == []


def test_each_module_has_its_test_file():
    assert without_tests(package(), all_test_files()) == []


def test_each_test_file_belongs_to_a_module():
    assert misfiled(package(), all_test_files()) == []


def test_no_test_file_is_too_large():
    lines = {path: len(text.splitlines()) for path, text in all_test_files().items()}
    assert {path: count for path, count in lines.items() if count > LARGEST_TEST_FILE} == {}


def test_imports_point_down():
    assert upward(found_imports()) == []


def test_no_imports_are_circular():
    assert cycle(found_imports()) == []


def test_what_is_private_stays_in_its_module():
    assert private(found_imports()) == []


def test_the_design_names_every_module():
    design = re.sub(r"```.*?```", "", (ROOT / "docs/design.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", design))))
    assert [module for module in package() if module and module.rpartition(".")[2] not in words] == []


def test_everything_is_named_somewhere():
    elsewhere = {word for path in everything_else() for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    assert sorted(unused(package(), elsewhere)) == sorted(UNNAMED_ON_PURPOSE)


def test_the_trainer_has_no_base_class_with_behaviour():
    """Its behaviour is in parts, not in base classes; on newer TRL, `ppo_base` replaces TRL's PPO trainer."""
    from trl_trustkl import TrustKLPPOTrainer

    ours = [cls for cls in TrustKLPPOTrainer.__mro__[1:] if cls.__module__.startswith(PACKAGE)]
    assert [cls.__module__ for cls in ours] in ([], ["trl_trustkl.trl_compat.ppo_base"])


# -- that each rule can fail -------------------------------------------------------------------------------------------


def broken(path: str, text: str) -> list[Import]:
    """The imports of the package if one of its files, or a new one, contains `text`."""
    return list(imports({**package(), **parsed({path: text})}))


@pytest.mark.parametrize(("lines", "fails"), [(LONGEST_FUNCTION, False), (LONGEST_FUNCTION + 1, True)])
def test_a_long_function_is_found(lines, fails):
    body = "\n".join(["        pass"] * (lines - 1))
    assert bool(too_long({"a": f"class A:\n    async def f(self):\n{body}"})) == fails


@pytest.mark.parametrize(("lines", "fails"), [(LARGEST_MODULE, False), (LARGEST_MODULE + 1, True)])
def test_a_large_module_is_found(lines, fails):
    assert bool(too_large(parsed({"a.py": "x = 1\n" * lines}))) == fails


MODULES = parsed(
    {
        "__init__.py": "def __getattr__(name): ...",
        "masking.py": "",
        "cli/__init__.py": "'''Nothing.'''",
        "cli/__main__.py": "",
        "policy/lora.py": "",
    }
)
FILES = dict.fromkeys(
    ["test_init.py", "test_masking.py", "cli/test_main.py", "policy/test_lora.py", "policy/test_lora_speed.py"],
    "def test_it(): ...",
)


def test_a_module_without_a_test_file_is_found():
    assert without_tests(MODULES, FILES) == []
    assert without_tests(MODULES, {**FILES, "test_init.py": "x = 1"}) == [""]
    assert without_tests(MODULES, {path: FILES[path] for path in FILES if path != "policy/test_lora.py"}) == [
        "policy.lora"
    ]


@pytest.mark.parametrize(
    "path", ["test_lora.py", "policy/test_loras.py", "policy/test_masking.py", "ppo/test_attacks.py"]
)
def test_a_test_file_without_a_module_is_found(path):
    assert misfiled(MODULES, {**FILES, "tiny.py": "", "end_to_end/test_kills.py": ""}) == []
    assert misfiled(MODULES, {**FILES, path: ""}) == [path]


@pytest.mark.parametrize(
    ("statement", "above"),
    [
        ("from .ppo.config import TrustKLPPOConfig", "ppo.config"),
        ("from . import ppo", "ppo"),
        ("from .ppo import config", "ppo.config"),
        ("import trl_trustkl.ppo.config", "ppo.config"),
        ("from trl_trustkl.report import schema", "report.schema"),
        ("def f():\n    from .report.schema import Run", "report.schema"),
        ("if TYPE_CHECKING:\n    from .cli import main", "cli"),
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(statement, above):
    assert upward(broken("bounds.py", statement)) == [f"bounds imports {above}, which is above it"]


def test_an_upward_import_of_a_package_is_found():
    """Relative imports count from the package itself, one level higher than in its modules."""
    assert upward(broken("report/__init__.py", "from ..compare import page")) == [
        "report imports compare.page, which is above it"
    ]
    assert upward(broken("report/__init__.py", "from .schema import Run")) == []


def test_a_module_without_a_layer_is_found():
    assert upward(broken("helpers.py", "from .errors import ConfigError")) == ["helpers is in no layer"]


def test_a_circular_import_is_found():
    assert set(cycle(broken("masking.py", "def f():\n    from .trust import measurement"))) == {
        "masking",
        "trust.measurement",
    }


@pytest.mark.parametrize(
    "statement",
    ["from ..report.figures import _label", "from ..ppo import _hidden", "from ..ppo._hidden import PPOConfig"],
)
def test_a_private_import_is_found(statement):
    files = {"cli/table.py": statement, "ppo/_hidden.py": "class PPOConfig: ..."}
    assert len(private(list(imports(parsed(files))))) == 1


def test_a_name_that_is_never_used_is_found():
    sources = parsed(
        {"a.py": "LEFT = 1\nclass Used:\n    field: int\n    def method(self): ...\ndef over(): ...\nUsed()"}
    )
    assert sorted(unused(sources, set())) == ["a.LEFT", "a.field", "a.method", "a.over"]
    assert sorted(unused(sources, {"over", "field"})) == ["a.LEFT", "a.method"]
