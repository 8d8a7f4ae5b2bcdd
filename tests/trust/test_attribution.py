"""A point from which an update is rerun: everything is as it was, and is put back afterwards."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from tests.trust.tabular import OPTIMIZERS, Tabular, same
from trl_trustkl.trust.attribution import ReplayPoint, kl_without


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_from_a_replay_point_are_the_same_bit_for_bit(optimizer):
    run = Tabular(optimizer)
    run.step()
    start = ReplayPoint([run.snapshot()], None)
    results = []
    for _ in range(3):
        start.restore()
        run.step()
        run.step(size=2.0)
        results.append([*run.everything(), *map(torch.tensor, drawn())])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_the_scale_of_the_gradients_is_restored():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step() -> None:
        scaler.scale(weight.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step()
    assert scaler.get_scale() == 16.0
    point = ReplayPoint([], scaler)
    step()
    step()
    assert scaler.get_scale() == 64.0
    point.restore()
    assert scaler.get_scale() == 16.0
    step()
    assert scaler.get_scale() == 32.0


def test_each_rerun_begins_at_the_start_and_the_end_is_put_back():
    run = Tabular()
    sizes = {"clip": 2.0, "anchor": 0.5, "lr": 4.0}
    start = ReplayPoint([run.snapshot()], None)
    expected, old = {}, run.old
    for name, size in sizes.items():
        run.step(size)
        expected[name] = run.measure().kl
        start.restore()
    run.step()
    drawn()
    end, after = ReplayPoint([run.snapshot()], None), run.everything()
    next_draw = drawn()
    end.restore()
    run.old = old

    def rerun(name: str) -> float:
        run.step(sizes[name])
        return run.measure().kl

    assert kl_without(sizes, rerun, start=start, end=end) == expected
    assert len(set(expected.values())) == 3
    assert same(run.everything(), after) and drawn() == next_draw


def test_a_kl_that_is_not_finite_is_none_and_an_error_still_puts_the_end_back():
    run = Tabular()
    start = ReplayPoint([run.snapshot()], None)
    run.step()
    end, after = ReplayPoint([run.snapshot()], None), run.everything()
    values = {"a": math.nan, "b": math.inf, "c": 0.5}
    assert kl_without(values, values.__getitem__, start=start, end=end) == {"a": None, "b": None, "c": 0.5}
    assert same(run.everything(), after)
    with pytest.raises(KeyError):
        kl_without(["unknown"], values.__getitem__, start=start, end=end)
    assert same(run.everything(), after)
