"""Every callback of transformers and TRL on the trainer: it works, is rejected, or needs a package that is not installed.

The callbacks are read from the source of both libraries, because modules whose packages are not installed cannot be
imported. docs/migrating.md has a table of them, which each test compares with what happens.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import TrainerCallback

from tests import tiny
from tests.pages import table_rows
from trl_trustkl.errors import NotAvailableYetError

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
ROWS = table_rows(PAGE, "callback")


@cache
def callbacks() -> dict[str, list[str]]:
    """The public callbacks, by name, and the modules that define one of that name."""
    found: dict[str, list[str]] = {}
    bases: dict[str, set[str]] = {}
    for package in ("transformers", "trl"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            text = "" if path.is_relative_to(root / "models") else path.read_text("utf-8")
            for node in ast.walk(ast.parse(text)) if "Callback" in text else ():
                if isinstance(node, ast.ClassDef):
                    # Some import a callback under a private name, to define another of its name.
                    parents = {ast.unparse(base).split(".")[-1].lstrip("_") for base in node.bases} - {node.name}
                    bases[node.name] = bases.get(node.name, set()) | parents
                    found.setdefault(node.name, []).append(
                        ".".join(path.relative_to(root.parent).with_suffix("").parts)
                    )
    kinds = {"TrainerCallback"}
    while more := {name for name, parents in bases.items() if parents & kinds} - kinds:
        kinds |= more
    kinds -= {"TrainerCallback", "CallbackHandler", "CallbackHandlerWithRefModel"}  # of a trainer, not for one
    return {name: found[name] for name in kinds if not name.startswith("_")}


def load(name: str) -> list[Any]:
    """The classes of this name; a test is skipped if their modules need a package that is not installed."""
    try:
        return [getattr(importlib.import_module(module), name) for module in callbacks()[name]]
    except ImportError as error:
        pytest.skip(f"{name} needs a package: {error}")


def test_the_page_has_a_row_for_every_callback():
    assert set(ROWS) == set(callbacks())
    assert all(said.startswith(("works", "error", "not tried: package not installed")) for said in ROWS.values())
    assert {"BEMACallback", "EarlyStoppingCallback", "WandbCallback", "StepIntervalCallback"} <= set(ROWS)


def trainer(folder: Any, **arguments: Any) -> Any:
    changes = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "greater_is_better": True}
    return tiny.trainer(folder, changes=changes, eval_dataset=tiny.prompts(4), **arguments)


@pytest.fixture
def kubeflow(tmp_path, monkeypatch):
    """A server that keeps the progress that it gets, in percent."""
    progress: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            progress.append(body["trainerStatus"].get("progressPercentage"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    yield progress
    server.shutdown()
    server.server_close()


calls: list[Any] = []
MAKERS: dict[str, Callable[[Any, Any], TrainerCallback]] = {
    "LogCompletionsCallback": lambda kind, trainer: kind(trainer, num_prompts=2, freq=1),
    "StepIntervalCallback": lambda kind, trainer: kind(lambda *_, **__: calls.append(trainer.state.global_step), 1),
    "SyncRefModelCallback": lambda kind, trainer: kind(trainer.ref_model, trainer.accelerator),
    "SyncTeacherModelCallback": lambda kind, trainer: kind(trainer.ref_model, trainer.accelerator),
    "PEFTAdapterEMACallback": lambda kind, trainer: kind(trainer.policy_model, accelerator=trainer.accelerator),
}
"""How to construct a callback that needs arguments."""


def made(kind: Any, trainer: Any) -> TrainerCallback:
    return MAKERS.get(kind.__name__, lambda kind, _: kind())(kind, trainer)


@pytest.mark.parametrize("name", [name for name, said in ROWS.items() if said.startswith("works")])
@pytest.mark.parametrize("arguments", [{}, {"peft_config": None}], ids=["adapter", "full"])
def test_a_callback_that_works(name, arguments, tmp_path, monkeypatch, kubeflow, capsys):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    calls.clear()
    run = trainer(tmp_path / "run", **arguments)
    kind = load(name)[0]
    run.remove_callback(kind)  # one that transformers added
    run.add_callback(callback := made(kind, run))
    run.train()
    assert callback in run.callback_handler.callbacks and run.state.global_step == 2
    shown = capsys.readouterr()
    effects: dict[str, Callable[[], Any]] = {
        "EarlyStoppingCallback": lambda: run.state.best_metric is not None,
        "LogCompletionsCallback": lambda: [row[0] for row in callback.table] == ["1", "1", "2", "2"],
        "PrinterCallback": lambda: "'objective/kl'" in shown.out,
        "ProgressCallback": lambda: "2/2" in shown.err,
        "RichProgressCallback": lambda: "Training" in shown.out and "objective" in shown.out,
        "TensorBoardCallback": lambda: any((tmp_path / "events").iterdir()),
        "KubeflowCallback": lambda: kubeflow[0] == 0 and kubeflow[-1] == 100,
        "StepIntervalCallback": lambda: calls == [1, 2],
        "DefaultFlowCallback": lambda: (tmp_path / "run" / "checkpoint-2").exists(),
        "JITCheckpointCallback": lambda: callback.jit_manager is None,
    }
    assert effects[name](), (shown, calls, kubeflow)


@pytest.mark.parametrize("name", [name for name, said in ROWS.items() if said.startswith("error")])
@pytest.mark.parametrize("arguments", [{}, {"peft_config": None}], ids=["adapter", "full"])
def test_a_callback_that_cannot_work_is_rejected_before_the_first_rollout(name, arguments, tmp_path):
    run = trainer(tmp_path, **arguments)
    for kind in load(name):
        run.add_callback(callback := made(kind, run))
        with pytest.raises(NotAvailableYetError, match=f"`callbacks` got a {name}") as error:
            run.train()
        assert all(code in str(error.value) for code in re.findall(r"`([^`]+)`", ROWS[name]))
        run.remove_callback(callback)
    assert not (tmp_path / "bounds.jsonl").exists()


def test_a_subclass_of_a_callback_that_cannot_work_is_rejected_and_another_of_its_name_is_not(tmp_path):
    class Mine(trl.BEMACallback):
        pass

    run = trainer(tmp_path / "rejected")
    run.add_callback(Mine())
    with pytest.raises(NotAvailableYetError, match="`callbacks` got a Mine.* holds policy and value"):
        run.train()
    other = type("BEMACallback", (TrainerCallback,), {})
    tiny.trainer(tmp_path / "other", changes={"max_steps": 1}, callbacks=[other()]).train()


PACKAGES = {
    "AzureMLCallback": "azureml",
    "ClearMLCallback": "clearml",
    "CodeCarbonCallback": "codecarbon",
    "CometCallback": "comet_ml",
    "DVCLiveCallback": "dvclive",
    "DagsHubCallback": "dagshub",
    "FlyteCallback": "flytekit",
    "MLflowCallback": "mlflow",
    "MergeModelCallback": "mergekit",
    "NeptuneCallback": "neptune",
    "NotebookProgressCallback": "IPython",
    "SwanLabCallback": "swanlab",
    "TrackioCallback": "trackio",
    "WandbCallback": "wandb",
    "WeaveCallback": "weave",
}


@pytest.mark.parametrize("name", [name for name, said in ROWS.items() if said.startswith("not tried")])
def test_a_callback_that_was_not_tried_needs_a_package(name):
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    package_of_module, _, module = callbacks()[name][0].rpartition(".")
    spec = importlib.util.find_spec(package_of_module)
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / f"{module}.py").read_text("utf-8")
    assert f"import {package}" in text or f"from {package}" in text
