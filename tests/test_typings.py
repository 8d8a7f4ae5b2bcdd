"""The stubs in `typings/` against the installed libraries, and misspelt attributes as errors of mypy."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import tiny
from trl_trustkl.trl_compat.ppo_base import PPOConfig
from trl_trustkl.trl_compat.trl_trainers import TRLConfig, TRLTrainer

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "typings"
PATHS = sorted(STUBS.rglob("*.pyi"))

pytestmark = pytest.mark.filterwarnings("ignore")


# -- the stubs match the libraries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An object of each class whose attributes are set in its constructor; of other classes the class itself is checked."""
    trainer = tiny.trainer(tmp_path_factory.mktemp("typings"))
    lora = next(module for module in trainer.model.policy.modules() if isinstance(module, LoraLayer))
    return {
        "Accelerator": trainer.accelerator,
        "BaseTunerLayer": lora,
        "CallbackHandler": trainer.callback_handler,
        "GenerationConfig": GenerationConfig(),
        "LoraLayer": lora,
        "ModulesToSaveWrapper": ModulesToSaveWrapper(nn.Linear(2, 2), "default"),
        "PeftModel": trainer.model.policy,
        "PreTrainedModel": tiny.llama(),
        "PreTrainedTokenizerBase": tiny.tokenizer(),
        "TrainableTokensWrapper": TrainableTokensWrapper(nn.Embedding(2, 2), "default", [1]),
        "Trainer": trainer,
        "_BaseTrainer": trainer,
        "_Logger": logging.get_logger("trl_trustkl"),
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(STUBS)))
def test_what_a_stub_declares_is_there(path: Path, objects: dict[str, Any]) -> None:
    parts = path.relative_to(STUBS).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert list(missing(path.read_text("utf-8"), module, objects)) == []


def missing(stub: str, module: Any, objects: dict[str, Any]) -> Iterator[str]:
    """The names that the stub of a module declares and that neither the module nor its objects have."""
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):  # `import x as x` declares a name of this module
            yield from (alias.name for alias in node.names if alias.asname and not hasattr(module, alias.asname))
        elif isinstance(node, ast.FunctionDef):
            yield from mismatched(node, getattr(module, node.name, None), node.name)
        elif isinstance(node, ast.AnnAssign) and not hasattr(module, node.target.id):
            yield node.target.id
        elif isinstance(node, ast.ClassDef):
            cls = getattr(module, node.name, None) or type(objects.get(node.name))
            yield from missing_of_class(node, cls, objects.get(node.name, cls))


def missing_of_class(stub: ast.ClassDef, cls: type, example: Any) -> Iterator[str]:
    """`example`: an object of the class, or the class itself."""
    ancestors = {each.__name__ for each in (cls if isinstance(example, type) else type(example)).__mro__}
    for base in stub.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        if name not in ancestors | {"NamedTuple"}:
            yield f"{stub.name}({name})"
    fields = (
        getattr(cls, "__dataclass_fields__", None) if "dataclass" in map(ast.unparse, stub.decorator_list) else None
    )
    for node in stub.body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            if not (hasattr(example, name) if fields is None else name in fields):
                yield f"{stub.name}.{name}"
        elif isinstance(node, ast.FunctionDef) and node.name not in ("__getattr__", "__setattr__"):
            function = getattr(cls, node.name, None) or getattr(example, node.name, None)
            if "property" not in map(ast.unparse, node.decorator_list):
                yield from mismatched(node, function, f"{stub.name}.{node.name}")
            elif not hasattr(example, node.name):
                yield f"{stub.name}.{node.name}"


def mismatched(stub: ast.FunctionDef, function: Any, name: str) -> Iterator[str]:
    """The parameters of a stub that the function does not take, by name or by position."""
    if function is None:
        yield name
        return
    found = [each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")]
    kinds = {each.kind for each in found}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    names = [each.name for each in found]
    in_place = [each.arg for each in (*stub.args.posonlyargs, *stub.args.args) if each.arg not in ("self", "cls")]
    for place, each in enumerate(in_place):
        if each in names and names.index(each) != place:
            yield f"{name}({each}), which is not parameter {place + 1}"
    for each in (*in_place, *(each.arg for each in stub.args.kwonlyargs)):
        if each not in names and not takes_any:
            yield f"{name}({each})"
    if stub.args.kwarg and not takes_any:
        yield f"{name}(**{stub.args.kwarg.arg})"


@pytest.mark.parametrize(
    ("stub", "found"),
    [
        ("def set_seed(seed: int) -> None: ...", []),
        ("def set_sead(seed: int) -> None: ...", ["set_sead"]),
        ("def set_seed(sead: int) -> None: ...", ["set_seed(sead)"]),
        ("def set_seed(deterministic: bool) -> None: ...", ["set_seed(deterministic), which is not parameter 1"]),
        ("def set_seed(seed: int, **kwargs: Any) -> None: ...", ["set_seed(**kwargs)"]),
        ("from .trainer import Trainor as Trainor", ["Trainor"]),
        ("LIMIT: int", ["LIMIT"]),
        ("class Trainer:\n    args: int\n    arks: int", ["Trainer.arks"]),
        ("class Trainer:\n    def log(self, logs): ...\n    def lock(self): ...", ["Trainer.lock"]),
        ("class Trainer:\n    @property\n    def arks(self): ...", ["Trainer.arks"]),
        ("class Trainer(ExportableState): ...", ["Trainer(ExportableState)"]),
        ("@dataclass\nclass TrainingArguments:\n    seed: int\n    sead: int", ["TrainingArguments.sead"]),
        ("@dataclass\nclass TrainingArguments:\n    should_save: bool", ["TrainingArguments.should_save"]),
    ],
)
def test_a_declared_name_that_does_not_exist_is_found(stub: str, found: list[str], objects: dict[str, Any]) -> None:
    assert list(missing(stub, transformers, objects)) == found


def test_the_protocols_of_trl_trainers_are_true() -> None:
    """Each field is one of the three configurations; attributes set in a constructor are searched for in its source."""
    configs = {"grpo": GRPOConfig, "rloo": RLOOConfig, "ppo": PPOConfig}
    for name in TRLConfig.__annotations__:
        assert any(hasattr(config, name) for config in configs.values()), name
    for kind in (GRPOTrainer, RLOOTrainer):
        text = "".join(inspect.getsource(each.__init__) for each in kind.__mro__ if each is not object)
        for name in TRLTrainer.__annotations__:
            assert f"self.{name} = " in text, f"{kind.__name__}.{name}"


# -- a misspelt attribute is an error ----------------------------------------------------------------------------------


class Plant(NamedTuple):
    """A misspelling: the first `old` in the file is replaced by `new`, and the error of mypy names `wrong`."""

    file: str
    old: str
    new: str
    wrong: str


PROBE = "\n    def probe(self) -> object:\n        return "

PLANTS = (
    Plant("callbacks/adaptive_kl.py", "self.trainer.beta", "self.trainr.beta", "trainr"),
    Plant("callbacks/adaptive_kl.py", "self.trainer.beta = ", "self.trainer.betta = ", "betta"),
    Plant("callbacks/adaptive_kl.py", "self.trainer.args.kl_coef = ", "self.trainer.args.kl_coeff = ", "kl_coeff"),
    Plant("callbacks/bound_report.py", "Path(args.output_dir)", "Path(args.lerning_rate)", "lerning_rate"),
    Plant(
        "callbacks/bound_report.py", "state.is_world_process_zero", "state.is_word_process_zero", "is_word_process_zero"
    ),
    Plant("policy/reference.py", "self.policy.requires_grad_(", "self.polcy.requires_grad_(", "polcy"),
    Plant("policy/split_lm.py", "faster_kernels(self.causal,", "faster_kernels(self.cawsal,", "cawsal"),
    Plant("policy/value_head.py", "temperature=self.temperature", "temperature=self.temprature", "temprature"),
    Plant("ppo/config.py", "return self.cliprange", "return self.clipranje", "clipranje"),
    Plant("ppo/config.py", "self.ref_model_sync_steps", "self.ref_model_sink_steps", "ref_model_sink_steps"),
    Plant("ppo/optimise.py", "self.args.norm_limit", "self.args.norm_limits", "norm_limits"),
    Plant("ppo/optimise.py", "self.sharding.backward", "self.sharding.backwards", "backwards"),
    Plant("ppo/trainer.py", "self.parts.order.rows", "self.partz.order.rows", "partz"),
    Plant("ppo/trainer.py", "self.args.trust_stop", "self.args.trust_stopp", "trust_stopp"),
    Plant("ppo/trainer.py", "self.parts.coefficients.kl\n", "self.parts.coefficients.kll\n", "kll"),
    Plant("ppo/trainer.py", "ready_to_train(self.model)", "ready_to_train(self.modell)", "modell"),
    Plant("ppo/loop.py", "state.episode += ", "state.episodes += ", "episodes"),
    Plant("ppo/scoring.py", "self.models.reference, micro", "self.models.referense, micro", "referense"),
    Plant("ppo/evaluation.py", "self.processes.count", "self.processes.cound", "cound"),
    Plant("policy/reference.py", "self.split_lm.hidden_states", "self.split_lm.hiden_states", "hiden_states"),
    Plant("parallel/processes.py", "self._accelerator.gather(", "self._accelerator.gathr(", "gathr"),
    Plant("run/checkpointer.py", "self._write_model(unfinished", "self._write_modell(unfinished", "_write_modell"),
    Plant("trust/limits.py", "(found.kl, self.max_kl)", "(found.kl, self.max_kll)", "max_kll"),
    Plant("rollout/rewards.py", "context_length(self.model)", "context_length(self.modle)", "modle"),
    Plant("rollout/scorer.py", "range(self.retries)", "range(self.retrys)", "retrys"),
    Plant("rollout/transformers_engine.py", "self._causal.generate(", "self._causal.genrate(", "genrate"),
    Plant("trl_compat/module.py", "None]\n", f"None]\n{PROBE}self.wieght\n", "wieght"),
    Plant("trl_compat/ppo_base.py", '"ppo"]\n', f'"ppo"]\n{PROBE}self.args.lerning_rate\n', "lerning_rate"),
    Plant("trl_compat/trl_logs.py", "args.num_ppo_epochs", "args.num_ppo_epoch", "num_ppo_epoch"),
)
"""All are planted in one copy of the source, since mypy takes long."""

slow = pytest.mark.slow  # mypy analyses PyTorch without a cache


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The errors of mypy for the package with all misspellings."""
    pytest.importorskip("mypy")
    copy = tmp_path_factory.mktemp("planted")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for folder in ("trl_trustkl", "typings"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new, _ in PLANTS:
        path = copy / "trl_trustkl" / file
        before, found, after = path.read_text("utf-8").partition(old)
        assert found, f"{file} does not say {old!r}"
        path.write_text(before + new + after, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


@slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.file}-{plant.wrong}")
def test_a_misspelt_attribute_is_an_error(plant: Plant, errors: list[str]) -> None:
    said = f'has no attribute "{plant.wrong}"'
    assert [line for line in errors if line.startswith(f"trl_trustkl/{plant.file}:") and said in line], errors


@slow
def test_mypy_reports_no_other_error(errors: list[str]) -> None:
    wrong = {f'has no attribute "{plant.wrong}"' for plant in PLANTS}
    assert [line for line in errors if not any(said in line for said in wrong)] == []
    assert all("[attr-defined]" in line for line in errors)
