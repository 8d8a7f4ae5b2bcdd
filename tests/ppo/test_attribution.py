"""Which mechanisms are on in an update, which of them did nothing, and what is recorded of an attributed update."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.weights import same, trained_weights
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.errors import ConfigError
from trl_trustkl.report.series import COUNTERFACTUALS
from trl_trustkl.trust.gradient_scale import GradientScale

pytestmark = pytest.mark.filterwarnings("ignore")
SHARES = ("anchor", "clip", "response_mask", "penalty", "stop", "backtrack", "grad_norm", "lr")
OFF = {"kl_coef": 0.0, "clip_rule": "none", "max_grad_norm": 0.0, "clip_value": False, "learning_rate": 1e-2}


class Watched(TrustKLPPOTrainer):
    """Keeps which mechanisms were left out of a rerun."""

    def _kl_of_rerun(self, batch: Any, without: str) -> float:
        self.reran = [*getattr(self, "reran", []), without]
        return super()._kl_of_rerun(batch, without)


def trained(folder: Any, **changes: Any) -> tuple[Watched, list[dict[str, Any]]]:
    settings = {"attribution_every": 1, "max_steps": 1} | OFF | changes
    trainer = tiny.trainer(folder, kind=Watched, changes=settings)
    trainer.train()
    return trainer, load_records(folder)


def test_without_any_mechanism_nothing_is_rerun(tmp_path):
    trainer, (record,) = trained(tmp_path)
    assert list(record["counterfactual"]) == [*SHARES, "value_clip"] == list(COUNTERFACTUALS), "the report reads others"
    assert set(record["counterfactual"].values()) == {None}
    assert record["binding"] == "none" and not hasattr(trainer, "reran")


@pytest.mark.parametrize(
    ("changes", "reran"),
    [
        ({"kl_coef": 0.5}, {"anchor"}),
        ({"kl_coef": 0.5, "kl_placement": "loss", "kl_estimator": "exact"}, {"anchor"}),
        ({"clip_rule": "ppo"}, {"clip"}),
        ({"response_mask_kl": 1e-4}, {"response_mask"}),
        ({"trust_coef": 0.1}, {"penalty"}),
        ({"trust_stop": 1e-6}, {"stop"}),
        ({"max_grad_norm": 0.01}, {"grad_norm"}),
        ({"detach_value_head": False, "clip_value": True}, {"value_clip"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mechanism_that_is_on_is_left_out_once(changes, reran, tmp_path):
    trainer, (record,) = trained(tmp_path, **changes)
    assert set(trainer.reran) == reran and len(trainer.reran) == 1
    found = record["counterfactual"]
    assert list(found) == [*SHARES, "value_clip"]
    assert {name for name, kl in found.items() if kl is not None} == reran


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"trust_stop": 100.0}, "stop"),
        ({"max_grad_norm": 1e9}, "grad_norm"),
        ({"trust_lr_target": 0.1}, "lr"),
        ({"trust_max_kl": 100.0}, "backtrack"),
    ],
)
def test_a_mechanism_that_did_nothing_needs_no_rerun(changes, idle, tmp_path):
    trainer, (record,) = trained(tmp_path, **changes)
    assert not hasattr(trainer, "reran")
    assert {name: kl for name, kl in record["counterfactual"].items() if kl is not None} == {
        idle: record["trust"]["kl"]
    }


@pytest.mark.parametrize("changes", [{}, {"detach_value_head": True}, {"vf_coef": 0.0}, {"clip_value": False}])
def test_clipping_the_value_counts_only_where_the_value_trains_the_policy(changes, tmp_path):
    shared = {"detach_value_head": False, "clip_value": True} | changes
    _, (record,) = trained(tmp_path, **shared)
    assert (record["counterfactual"]["value_clip"] is not None) == (changes == {})


def test_the_kl_without_backtracking_is_that_of_the_proposed_update(tmp_path):
    trainer, (record,) = trained(tmp_path, trust_max_kl=1e-4)
    trust = record["trust"]
    assert trust["scale"] < 1 and not hasattr(trainer, "reran")
    assert record["counterfactual"]["backtrack"] == trust["kl_proposed"] > trust["kl"]
    assert record["binding"] == "backtrack"


def test_other_mechanisms_are_left_out_under_the_limit(tmp_path):
    _, (record,) = trained(tmp_path, trust_max_kl=1e-3, clip_rule="ppo", max_grad_norm=0.01)
    found = record["counterfactual"]
    assert found["clip"] <= 1e-3 and found["grad_norm"] <= 1e-3 < found["backtrack"]


def test_an_update_that_would_be_rolled_back_has_the_kl_for_which_it_would(tmp_path, caplog):
    _, (free,) = trained(tmp_path / "free", clip_rule="ppo", trust_stop=1e-6)
    without_stop = free["counterfactual"]["stop"]
    assert free["trust"]["kl"] < without_stop / 2
    with caplog.at_level(logging.WARNING):
        _, (record,) = trained(tmp_path / "panic", clip_rule="ppo", trust_stop=1e-6, panic_kl=without_stop / 2)
    assert record["refused"] is None and record["counterfactual"] == free["counterfactual"]
    assert "rejected" not in caplog.text


def test_a_rejected_update_has_no_counterfactual(tmp_path):
    trainer, (record,) = trained(tmp_path, clip_rule="ppo", panic_kl=1e-12)
    assert record["refused"] is not None and record["counterfactual"] is None and record["binding"] == "none"
    assert not hasattr(trainer, "reran")


def test_only_every_nth_update_is_attributed_and_its_time_is_recorded(tmp_path):
    _, found = trained(tmp_path, clip_rule="ppo", attribution_every=2, max_steps=5)
    assert [record["update"] for record in found if record["counterfactual"] is not None] == [2, 4]
    assert [record["update"] for record in found if "attribute" in record["seconds"]] == [2, 4]


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, "often", True])
def test_a_wrong_interval_is_an_error(value, tmp_path):
    with pytest.raises(ConfigError, match="`attribution_every` got"):
        tiny.config(tmp_path, attribution_every=value)


# -- what is done, and what is put back --------------------------------------------------------------------------------


def test_gradient_norms_do_not_bind_adam_but_bind_sgd(tmp_path):
    """One step of Adam is the same whatever the norm of the gradient is limited to; a step of SGD is not."""
    one = {"num_ppo_epochs": 1, "num_mini_batches": 1, "max_grad_norm": 0.05}
    for name, rate, binding in (("adamw_torch", 1e-2, "none"), ("sgd", 1.0, "grad_norm")):
        for every in (1, 0):
            _, (record,) = trained(
                tmp_path / f"{name}{every}", optim=name, learning_rate=rate, attribution_every=every, **one
            )
            assert record["shares"]["grad_norm"] > 0.9 and record["binding"] == binding
            if every:
                kl, without = record["trust"]["kl"], record["counterfactual"]["grad_norm"]
                assert without == pytest.approx(kl, rel=1e-3) if name == "adamw_torch" else without > 100 * kl


def test_under_adam_the_limit_on_the_norm_does_not_bind_a_run(tmp_path, monkeypatch):
    """Adam's running means are of clipped gradients. Without the factor that makes others comparable, every rerun but the
    first would go further, and a run without the limit does not."""
    changes = {"max_grad_norm": 0.05, "max_steps": 8, "lr_scheduler_type": "constant"}

    def mean_factor(folder: Path) -> float:
        _, found = trained(folder, **changes)
        assert all(record["shares"]["grad_norm"] > 0.9 for record in found)
        return math.exp(
            sum(math.log(each["counterfactual"]["grad_norm"] / each["trust"]["kl"]) for each in found) / len(found)
        )

    assert 0.8 < mean_factor(tmp_path / "run") < 1.25
    monkeypatch.setattr(GradientScale, "factor", 1.0)
    assert mean_factor(tmp_path / "without the factor") > 1.4


def test_a_difference_of_a_rerun_as_it_was_is_reported_once(tmp_path, caplog):
    class Inexact(Watched):
        def _kl_of_rerun(self, batch: Any, without: str) -> float:
            return super()._kl_of_rerun(batch, without) * (1.01 if without == "nothing" else 1.0)

    changes = {"attribution_every": 1, "max_steps": 2} | OFF | {"clip_rule": "ppo"}
    for kind, warnings in ((Watched, 0), (Inexact, 1)):
        trainer = tiny.trainer(tmp_path / kind.__name__, kind=kind, changes=changes)
        trainer.parts.attribution.exact = False
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert trainer.reran == ["clip", "nothing", "clip"]
        assert caplog.text.count("computes the same steps differently each time") == warnings
        assert set(load_records(tmp_path / kind.__name__)[0]["counterfactual"]) == {*SHARES, "value_clip"}


def test_an_error_in_a_rerun_leaves_the_update_as_it_was(tmp_path):
    after: dict[str, torch.Tensor] = {}

    class Failing(Watched):
        def _kl_of_rerun(self, batch: Any, without: str) -> float:
            super()._kl_of_rerun(batch, without)
            raise RuntimeError("out of memory")

        def attribute(self, *arguments: Any) -> Any:
            after.update(trained_weights(self.model))
            return super().attribute(*arguments)

    changes = {"attribution_every": 1, "max_steps": 2} | OFF | {"clip_rule": "ppo"}
    trainer = tiny.trainer(tmp_path, kind=Failing, changes=changes)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert same(trained_weights(trainer.model), after)
