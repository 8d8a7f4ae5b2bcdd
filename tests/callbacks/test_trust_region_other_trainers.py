"""`TrustRegionCallback` on every other trainer of TRL: it works, or is an error by the trainer's name.

The trainers are read from TRL's source, because modules whose packages are not installed cannot be imported. docs/grpo.md has
a table of them, which each test compares with what happens.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

from tests import tiny
from tests.end_to_end.dense_windows import Labelled, SetUp, assert_held, run
from tests.pages import table_rows
from tests.tiny import LIMIT
from tests.trl_trainers import trl_ppo
from trl_trustkl import TrustRegionCallback
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "grpo.md").read_text("utf-8")
ROWS = table_rows(PAGE, "trainer")
WORKS = [name for name, said in ROWS.items() if said.startswith("works")]
ERRORS = [name for name, said in ROWS.items() if said.startswith("error")]


@cache
def trainers() -> dict[str, list[str]]:
    """TRL's trainers by name, and the modules that define one of that name."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and not node.name.startswith("_"):
                assert any(ast.unparse(base).endswith("Trainer") for base in node.bases), f"{node.name} is no trainer"
                module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
                found.setdefault(node.name, []).append(module)
    return found


def test_the_page_has_a_row_for_every_trainer():
    assert set(trainers()) <= set(ROWS)
    gone = {name for name, said in ROWS.items() if "(TRL 1.12)" in said}
    assert set(ROWS) - set(trainers()) <= gone, "a row of a trainer that TRL does not have"
    assert gone == {name for name in gone if not hasattr(trl, name)}
    assert all(said.startswith(("works", "error", "not tried: needs ")) for said in ROWS.values())
    assert {"SDPOTrainer", "GMPOTrainer", "AsyncGRPOTrainer", "PPOTrainer"} <= set(ROWS)


def test_what_is_not_tried_has_no_configuration_of_grpo():
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    texts = [path.read_text("utf-8") for path in Path(spec.submodule_search_locations[0]).rglob("*_config.py")]
    for name in ROWS.keys() - {*WORKS, *ERRORS}:
        pattern = rf"class {name.removesuffix('Trainer')}Config\((\w+)\)"
        (base,) = [found for text in texts for found in re.findall(pattern, text)]
        assert base in ("_BaseConfig", "DistillationConfig")


def here(name: str) -> list[Any]:
    """The classes of this name in the installed TRL."""
    if name not in trainers():
        pytest.skip(f"TRL {trl.__version__} has no {name}")
    return [getattr(importlib.import_module(module), name) for module in trainers()[name]]


# -- those that work -------------------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "trl.experimental.gspo_token.grpo_trainer": {"importance_sampling_level": "sequence_token"},
    "trl.experimental.minillm.minillm_trainer": {"beta": 0.0},
}
ARGUMENTS = {"MiniLLMTrainer": lambda: {"teacher_model": tiny.llama(seed=3)}}


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_trainer_that_works(name, iterations, tmp_path):
    if name == "MiniLLMTrainer" and iterations == 2:
        pytest.skip("its loss can be used once for a generation batch, with or without the callback")
    for number, kind in enumerate(here(name)):
        setup = SetUp(
            {"num_iterations": iterations, "max_steps": 4 * iterations, **CHANGES.get(kind.__module__, {})},
            kind=type("Labelled", (Labelled, kind), {}), config=config_of(kind),
            arguments=ARGUMENTS.get(name, dict)(),
        )  # fmt: skip
        assert_held(run(setup, tmp_path / str(number)))


# -- those that do not -----------------------------------------------------------------------------------------------------


def config_of(kind: Any) -> Any:
    """The configuration of a trainer, which is beside it under the same name."""
    name = kind.__name__.removesuffix("Trainer") + "Config"
    packages = [kind.__module__, kind.__module__.rpartition(".")[0], "trl"]
    return next(getattr(module, name) for each in packages if hasattr(module := importlib.import_module(each), name))


def rows_of(**row: Any) -> Dataset:
    return Dataset.from_dict({name: [value] * 8 for name, value in row.items()})


PAIR = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
TALK = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
LABELLED = {"prompt": ["w1 w2"] * 8, "completion": ["w3"] * 8, "label": [True, False] * 4}
DATA = {
    "BCOTrainer": Dataset.from_dict(LABELLED),
    "KTOTrainer": Dataset.from_dict(LABELLED),
    **dict.fromkeys(("CPOTrainer", "DPOTrainer", "ORPOTrainer", "RewardTrainer"), rows_of(**PAIR)),
    **dict.fromkeys(("GKDTrainer", "GOLDTrainer", "IWOPDTrainer"), rows_of(**TALK)),
    "PRMTrainer": rows_of(prompt="w1 w2", completions=["w3"], labels=[True]),
    "SDFTTrainer": rows_of(prompt="w1 w2", privileged_context="w3"),
    "SFTTrainer": rows_of(text="w1 w2"),
    "TPOTrainer": rows_of(**PAIR, reference="w5"),
}
"""The data of a trainer that needs other columns than prompts."""


def built(kind: Any, folder: Path) -> Any:
    """A trainer of this class on a tiny Llama."""
    name = kind.__name__
    if name == "PPOTrainer":
        return trl_ppo(folder)
    tokenizer = tiny.tokenizer()
    if name == "GOLDTrainer":
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel()
    policy = folder / "policy"
    tiny.llama().save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    model = LlamaForCausalLM.from_pretrained(policy)
    given = {
        "teacher_model": str(policy) if name == "IWOPDTrainer" else tiny.llama(seed=3),
        "reward_funcs": tiny.good_words,
        "ref_model": None if name in ("DPOTrainer", "KTOTrainer", "BCOTrainer") else tiny.llama(seed=2),
    }
    accepted = inspect.signature(kind).parameters
    needed = {"reward_funcs"} if issubclass(kind, trl.GRPOTrainer) else set()
    arguments = {argument: value for argument, value in given.items() if argument in {*accepted, *needed}}
    return kind(
        model=tiny.scalar_model(model) if name == "RewardTrainer" else model,
        args=config_of(kind)(output_dir=str(folder), **tiny.QUIET),
        train_dataset=DATA.get(name, tiny.prompts()), processing_class=tokenizer, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_another_trainer_is_an_error_by_its_name(name, tmp_path):
    for number, kind in enumerate(here(name)):
        trainer = built(kind, tmp_path / str(number))
        callbacks = list(trainer.callback_handler.callbacks)
        with pytest.raises(ConfigError) as error:
            TrustRegionCallback(trainer, max_kl=LIMIT)
        assert str(error.value).startswith(f"`trainer` got a {name}") and "GRPOTrainer" in str(error.value)
        assert ("TrustKLPPOTrainer" in str(error.value)) == (name == "PPOTrainer")
        assert trainer.callback_handler.callbacks == callbacks, "the trainer was changed"
