"""Run TRL's own tests of GRPOTrainer and RLOOTrainer with and without this package's callbacks, and compare their outcomes.

    python benchmarks/trl_own_tests.py path/to/trl/tests
    python benchmarks/trl_own_tests.py path/to/trl/tests --out outcomes.json -- -k "not VLM" --timeout 300

The argument is the folder `tests` of a checkout of TRL, near the version that is installed. What follows `--` is passed to
pytest. The tests load small models and data sets from the hub. Where there is no hub, run this in a folder that holds them
under the same names, such as `trl-internal-testing/zen`.

The tests are run three times: without callbacks; with a `BoundReportCallback` and a `TrustRegionCallback` that only measures,
added to every trainer; and with a limit. Every difference between the outcomes is printed, with the trainers that
TrustRegionCallback rejects. The exit status is 1 if there is a difference.

This file is also the pytest plugin of these runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

VARIATIONS: dict[str, dict[str, float] | None] = {"without": None, "measured": {}, "limited": {"max_kl": 0.02}}
"""The arguments of the TrustRegionCallback; None for a run without callbacks."""
FILES = ("test_grpo_trainer.py", "test_rloo_trainer.py")


class Plugin:
    """Adds the callbacks of a variation to every GRPOTrainer and RLOOTrainer, and keeps the outcomes and the records."""

    def __init__(self, limits: dict[str, float] | None, file: str) -> None:
        self.file = file
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.rejected: dict[str, str] = {}
        self.trainers = 0
        self.kls: dict[str, list[float | None]] = defaultdict(list)
        self._test = ""
        if limits is not None:
            from trl import GRPOTrainer, RLOOTrainer

            for kind in (GRPOTrainer, RLOOTrainer):
                self._add_callbacks_to(kind, limits)

    def _add_callbacks_to(self, kind: Any, limits: dict[str, float]) -> None:
        construct = kind.__init__

        @functools.wraps(construct)
        def construct_and_add(trainer: Any, *args: Any, **kwargs: Any) -> None:
            construct(trainer, *args, **kwargs)
            self._add_callbacks(trainer, limits)

        kind.__init__ = construct_and_add

    def _add_callbacks(self, trainer: Any, limits: dict[str, float]) -> None:
        from transformers import TrainerCallback

        from trl_trustkl import BoundReportCallback, TrustRegionCallback
        from trl_trustkl.errors import ConfigError

        plugin = self

        class Records(TrainerCallback):
            def on_record(self, args: Any, state: Any, control: Any, *, record: Any, **_: Any) -> None:
                plugin.kls[plugin._test].append(record.trust.kl)

        try:
            callback = TrustRegionCallback(trainer, **limits)  # type: ignore[arg-type]
        except ConfigError as error:
            self.rejected[self._test] = str(error)
            return
        self.trainers += 1
        for each in (callback, BoundReportCallback(report=False), Records()):
            trainer.add_callback(each)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        from transformers import set_seed

        self._test = item.nodeid
        set_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            expected = "x" if hasattr(report, "wasxfail") else ""
            self.outcomes[report.nodeid] = f"{expected}{report.outcome}"
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons[report.nodeid] = str(report.longrepr if crash is None else crash.message)

    def pytest_sessionfinish(self) -> None:
        names = ("outcomes", "reasons", "rejected", "trainers", "kls")
        Path(self.file).write_text(json.dumps({name: getattr(self, name) for name in names}), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    variation, file = os.environ["TRL_OWN_TESTS"].split(":", 1)
    config.pluginmanager.register(Plugin(VARIATIONS[variation], file))


def run(tests: Path, variation: str, options: list[str]) -> dict[str, Any]:
    """What a run of the tests with a variation's callbacks found."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
        environment = {
            "TRL_OWN_TESTS": f"{variation}:{file}",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        files = [str(tests / name) for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "--rootdir", str(tests.parent)]
        status = subprocess.run([*command, *files, *options], env=os.environ | environment, check=False).returncode
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"pytest could not run the tests (exit status {status}).")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each test that has not the same outcome in every run."""
    tests = sorted({test for each in found.values() for test in each["outcomes"]})
    lines = []
    for test in tests:
        outcomes = {name: each["outcomes"].get(test, "missing") for name, each in found.items()}
        if len(set(outcomes.values())) > 1:
            lines.append(f"{test}: " + ", ".join(f"{name} {outcome}" for name, outcome in outcomes.items()))
            lines += [f"    {name}: {each['reasons'].get(test, '')[:300]}" for name, each in found.items()]
    return lines


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """The number of tests by outcome, and what the callbacks recorded, a line for each run."""
    lines = []
    for name, each in found.items():
        records = [(kl, test) for test, kls in each["kls"].items() for kl in kls]
        known = [(kl, test) for kl, test in records if kl is not None]
        counts = ", ".join(
            f"{count} {outcome}" for outcome, count in sorted(Counter(each["outcomes"].values()).items())
        )
        largest = "; largest KL {:.3g}, in {}".format(*max(known)) if known else ""
        lines.append(
            f"{name}: {counts}; {each['trainers']} trainers with the callbacks, {len(records)} records{largest}"
        )
        lines += [f"    rejected in {test}: {reason}" for test, reason in each["rejected"].items()]
    return lines


def main() -> int:
    import transformers
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder `tests` of a checkout of TRL")
    parser.add_argument("--out", type=Path, help="a JSON file for the outcome of every test")
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:end])
    found = {name: run(given.tests.resolve(), name, sys.argv[end + 1 :]) for name in given.variations}
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    different = differences(found)
    print(f"TRL {trl.__version__}, transformers {transformers.__version__}")
    print("\n".join([*summary(found), *(different or ["The outcomes are the same."])]))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
