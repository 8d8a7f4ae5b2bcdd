"""`trust_stop`: the check between mini-batches that ends an update early."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.tiny import FAST
from tests.watched import optimizer_steps, watched
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.types import Batch, Measurement, UpdateStats

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("limit", "stopped"), [(1e-9, True), (1e9, False), (None, False)])
def test_trust_stop_ends_the_update_after_the_step_that_went_too_far(tmp_path, monkeypatch, limit, stopped):
    trainer = watched(tmp_path, changes={"trust_stop": limit, "num_ppo_epochs": 3})
    steps = optimizer_steps(monkeypatch, trainer)
    trainer.train()
    assert Counter(steps) == dict.fromkeys((1, 2, 3), 1 if stopped else 6)
    for record in load_records(tmp_path):
        assert record["trust"]["stopped"] is stopped
        assert record["trust"]["epochs"] == (0.5 if stopped else 3.0)
        assert (record["binding"] == "stop") == stopped


class Stepwise(TrustKLPPOTrainer):
    """Keeps the mini-batch of every step, and what every check between steps measured.

    stepped: the micro-batches of each step. checks: the micro-batches of each check, its measurement, and the KL that a
    dense computation gives at the same weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stepped: list[list[int]] = []
        self.checks: list[tuple[list[int], Measurement, float]] = []
        self.optimising = False
        backward = self.parts.optimisation._backward
        self.parts.optimisation._backward = lambda batch, mini, *rest: (
            self.stepped.append(mini), backward(batch, mini, *rest)
        )[1]  # fmt: skip

    def optimise(self, batch: Batch) -> UpdateStats:
        micros = batch.scored.micro_batches
        self.old = [dense_logps(self.model.policy, micro, self.args.temperature) for micro in micros]
        self.optimising = True
        stats = super().optimise(batch)
        self.optimising = False
        return stats

    def _measure(self, batch: Batch, indices: Any) -> Measurement:
        indices = list(indices)
        measured = super()._measure(batch, indices)
        if self.optimising:
            self.checks.append((indices, measured, self.recomputed(batch, indices)))
        return measured

    def recomputed(self, batch: Batch, indices: list[int]) -> float:
        kls = []
        for index in indices:
            micro = batch.scored.micro_batches[index]
            new = dense_logps(self.model.policy, micro, self.args.temperature)
            kls.append(dense_kl(self.old[index], new)[micro.response_mask])
        return float(torch.cat(kls).mean())


def stepwise(folder: Any, **changes: Any) -> Stepwise:
    given = FAST | {
        "max_steps": 1,
        "trust_max_kl": None,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 3,
    }
    return tiny.trainer(folder, kind=Stepwise, changes=given | changes)


def test_the_check_is_the_exact_kl_of_the_mini_batch_just_stepped(tmp_path):
    trainer = stepwise(tmp_path, trust_stop=1e9)
    trainer.train()
    assert len(trainer.checks) == 5, "the checks are not those after the first five of six steps"
    assert [indices for indices, _, _ in trainer.checks] == trainer.stepped[:5]
    for indices, measured, dense in trainer.checks:
        assert len(indices) == 2 and not measured.complete
        assert measured.kl == pytest.approx(dense, abs=1e-5)
    for first, second in (trainer.checks[:2], trainer.checks[2:4]):
        assert sorted(first[0] + second[0]) == [0, 1, 2, 3], "an epoch does not take every micro-batch once"


def test_an_update_stops_at_the_first_check_over_the_limit(tmp_path):
    free = stepwise(tmp_path / "free", trust_stop=1e9)
    free.train()
    kls = [measured.kl for _, measured, _ in free.checks]
    for limit in sorted(0.5 * (a + b) for a, b in zip(sorted(kls), sorted(kls)[1:], strict=False)):
        first = next(i for i, kl in enumerate(kls) if kl > limit)
        trainer = stepwise(tmp_path / f"{limit}", trust_stop=limit)
        trainer.train()
        assert [measured.kl for _, measured, _ in trainer.checks] == kls[: first + 1]
        trust = load_records(tmp_path / f"{limit}")[0]["trust"]
        assert trust["stopped"] and trust["epochs"] == pytest.approx((first + 1) / 2)
    trainer = stepwise(tmp_path / "equal", trust_stop=max(kls))
    trainer.train()
    assert not load_records(tmp_path / "equal")[0]["trust"]["stopped"], "a KL equal to the limit stopped the update"


def test_a_check_that_is_nan_stops_the_update(tmp_path):
    trainer = stepwise(tmp_path, trust_stop=1e9)
    trainer._measure = lambda batch, indices: Stepwise._measure(trainer, batch, indices)._replace(
        kl=math.nan if trainer.optimising else 0.0
    )
    trainer.train()
    trust = load_records(tmp_path)[0]["trust"]
    assert trust["stopped"] and trust["epochs"] == 0.5
