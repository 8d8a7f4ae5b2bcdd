"""A counterfactual is what a trainer without the mechanism does.

An update that is rerun as it was is the same bit for bit, and a second trainer, with one mechanism off, makes the update that
the first one recorded as its counterfactual.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.end_to_end.fuzzing import reproducible
from tests.processes import in_two_processes
from tests.weights import optimizer_state, same, trained_weights
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.ppo.attribution import NOTHING

pytestmark = pytest.mark.filterwarnings("ignore")

ADAM = {"learning_rate": 1e-2, "trust_stop": 0.004, "max_grad_norm": 0.05}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 2.0, "trust_stop": 0.008, "max_grad_norm": 0.2},
    "adamw_torch": ADAM,
    "adamw_8bit": ADAM,
}
ALL = {
    "kl_coef": 0.2,
    "clip_rule": "ppo",
    "cliprange": 0.05,
    "loss_aggregation": "token_mean",
    "trust_coef": 1.0,
    "response_mask_kl": 0.015,
    "trust_max_kl": 0.004,
    "trust_lr_target": 0.05,
    "detach_value_head": False,
    "cliprange_value": 0.01,
    "vf_coef": 2.0,
    "seed": 3,
}
"""Every mechanism is on, and acts, with the settings of an optimizer."""
WITHOUT: dict[str, dict[str, Any]] = {
    "anchor": {"kl_coef": 0.0},
    "clip": {"clip_rule": "none"},
    "response_mask": {"response_mask_kl": None},
    "penalty": {"trust_coef": 0.0},
    "stop": {"trust_stop": None},
    "backtrack": {"trust_max_kl": None},
    "grad_norm": {"max_grad_norm": 0.0},
    "lr": {"trust_lr_target": None},
    "value_clip": {"clip_value": False},
}


def built(folder: Any, *, kind: Any = None, lr_factor: float = 0.25, **changes: Any) -> TrustKLPPOTrainer:
    """A trainer whose first update has a KL to the reference and a learning rate that was adapted already."""
    changes = {"max_steps": 1, "attribution_every": 1} | changes
    trainer = tiny.trainer(folder, tiny.llama(), kind=kind, changes=changes, ref_model=tiny.llama(seed=9))
    if (state := trainer.parts.coefficients.lr_state) is not None:
        trainer.parts.coefficients.lr_state = state._replace(coef=lr_factor)
    return trainer


def update(folder: Any, **changes: Any) -> dict[str, Any]:
    """The record of the first update."""
    built(folder, **changes).train()
    (record,) = load_records(folder)
    return record


# -- two trainers, side by side ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=OPTIMIZERS)
def with_all(request, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a trainer with every mechanism, and the record of its first update."""
    given = ALL | {"optim": request.param} | OPTIMIZERS[request.param]
    return given, update(tmp_path_factory.mktemp(request.param), **given)


@pytest.mark.parametrize("mechanism", WITHOUT)
def test_a_trainer_without_the_mechanism_makes_the_counterfactual_update(with_all, mechanism, tmp_path):
    given, record = with_all
    other = update(tmp_path, attribution_every=0, **given | WITHOUT[mechanism])
    assert record["counterfactual"][mechanism] == other["trust"]["kl"]
    assert other["counterfactual"] is None


def test_every_mechanism_acts_in_the_example(with_all):
    """Otherwise the test above would compare equal updates."""
    _, record = with_all
    acted = {name for name, kl in record["counterfactual"].items() if kl != record["trust"]["kl"]}
    assert acted == set(WITHOUT)
    assert record["trust"]["scale"] < 1 and record["trust"]["stopped"]


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "optim": st.sampled_from([*OPTIMIZERS]),
        "kl_placement": st.sampled_from(["reward", "loss", "both"]),
        "clip_rule": st.sampled_from(
            ["ppo", "dual", "spo", "cispo", "sapo", "gspo", "gmpo", "dppo_kl", "drpo", "troll"]
        ),
        "response_mask_kl": st.sampled_from([None, 0.005]),
        "num_mini_batches": st.sampled_from([1, 2]),
        "num_ppo_epochs": st.integers(1, 3),
        "trust_coef": st.sampled_from([0.0, 0.5]),
        "trust_stop": st.sampled_from([None, 0.01]),
        "trust_max_kl": st.sampled_from([None, 0.005]),
        "max_grad_norm": st.sampled_from([0.0, 0.1]),
        "detach_value_head": st.booleans(),
        "whiten_advantages": st.booleans(),
    }
)


def completed(drawn: dict[str, Any]) -> dict[str, Any]:
    common = {
        "kl_coef": 0.2,
        "kl_estimator": "exact",
        "loss_aggregation": "token_mean",
        "learning_rate": OPTIMIZERS[drawn["optim"]]["learning_rate"],
    }
    return common | drawn


@settings(reproducible, max_examples=8)
@given(CONFIGURATIONS, st.sampled_from([*WITHOUT]))
def test_any_trainer_without_a_mechanism_makes_the_counterfactual_update(drawn, mechanism):
    folder = Path(tempfile.mkdtemp())
    record = update(folder / "all", **completed(drawn))
    found = record["counterfactual"][mechanism]
    if found is not None:
        other = update(folder / "other", **completed(drawn) | WITHOUT[mechanism] | {"attribution_every": 0})
        assert found == other["trust"]["kl"]
    shutil.rmtree(folder)


# -- the update itself -------------------------------------------------------------------------------------------------


class Rerun(TrustKLPPOTrainer):
    """Reruns each update as it was and keeps whether weights, optimizer and KL were the same."""

    def attribute(self, batch: Any, stats: Any, measured: Any) -> Any:
        end = self.parts.optimisation.replay_point()
        weights, state = trained_weights(self.model), optimizer_state(self.optimizer)
        batch.context.start.restore()
        kl = self._kl_of_rerun(batch, NOTHING)
        self.same = [*getattr(self, "same", []), same(weights, trained_weights(self.model)), kl == measured.kl]
        self.same += map(torch.equal, state, optimizer_state(self.optimizer))
        end.restore()
        return super().attribute(batch, stats, measured)


@settings(reproducible, max_examples=8)
@given(CONFIGURATIONS)
def test_an_update_that_is_rerun_as_it_was_is_the_same_bit_for_bit(drawn):
    folder = Path(tempfile.mkdtemp())
    trainer = built(folder, kind=Rerun, **completed(drawn) | {"max_steps": 2})
    trainer.train()
    assert len(trainer.same) >= 4 and all(trainer.same)
    shutil.rmtree(folder)


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adapter": lambda folder: {},
    "full": lambda folder: {"peft_config": None},
    "full value model": lambda folder: {"peft_config": None, "value_model": tiny.scalar_model(tiny.llama())},
    "4-bit": lambda folder: {"model": tiny.four_bit(folder)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_attribution_as_without(kind, tmp_path):
    runs = []
    for every in (0, 1):
        changes = ALL | ADAM | {"attribution_every": every, "max_steps": 3}
        trainer = tiny.trainer(tmp_path / str(every), changes=changes, **KINDS[kind](tmp_path / f"model{every}"))
        trainer.train()
        runs.append((trainer, load_records(tmp_path / str(every))))
    (plain, without), (attributed, found) = runs
    assert same(trained_weights(plain.model), trained_weights(attributed.model))
    assert all(map(torch.equal, optimizer_state(plain.optimizer), optimizer_state(attributed.optimizer)))
    for one, other in zip(without, found, strict=True):
        assert other.pop("counterfactual").keys() == WITHOUT.keys() and one.pop("counterfactual") is None
        for name in ("seconds", "binding"):
            del one[name], other[name]
        assert one == other


# -- two processes -----------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
    import json, sys
    from pathlib import Path

    from tests.end_to_end.test_counterfactuals import ADAM, ALL, built
    from tests.weights import trained_weights

    folder = sys.argv[1]
    for every in (0, 1):
        changes = ALL | ADAM | dict(per_device_train_batch_size=2, max_steps=2, attribution_every=every)
        trainer = built(f"{folder}/{every}", **changes)
        assert trainer.accelerator.num_processes == 2
        found, attribute = [], trainer.attribute
        trainer.attribute = lambda *given: found.append(attribute(*given)) or found[-1]
        trainer.train()
        weights = [float(weight.double().abs().sum()) for weight in trained_weights(trainer.model).values()]
        Path(f"{folder}/{every}-{trainer.accelerator.process_index}.json").write_text(json.dumps([weights, found]))
"""


@pytest.mark.processes
def test_two_processes_rerun_the_same_update(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    in_two_processes(str(script), str(tmp_path), cwd=tmp_path)
    results = {
        (every, rank): json.loads((tmp_path / f"{every}-{rank}.json").read_text())
        for every in (0, 1)
        for rank in (0, 1)
    }
    weights = results[0, 0][0]
    assert all(each[0] == weights for each in results.values())
    found = results[1, 0][1]
    assert found == results[1, 1][1] == [record["counterfactual"] for record in load_records(tmp_path / "1")]
    assert len(found) == 2 and all(kl is not None for each in found for kl in each.values())
    assert len(set(found[0].values())) > 4
