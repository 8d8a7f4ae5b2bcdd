"""Random numbers: seeds from several keys, draws that keep the global state, and states saved as JSON."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch

from tests.processes import single_process
from trl_trustkl.run import rng


def draws() -> list[float]:
    """A number from each random stream of Python, NumPy and torch, the normal ones that come in pairs included."""
    numpy = [float(np.random.rand()), float(np.random.normal())]
    return [random.random(), random.gauss(0, 1), *numpy, float(torch.rand(())), float(torch.randn(()))]


def test_one_seed_for_each_combination_of_keys():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (11,), (-1,), (2**70, 1)]
    seeds = [rng.mixed_seed(*each) for each in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [rng.mixed_seed(*each) for each in keys]
    assert rng.mixed_seed(1, torch.tensor(2)) == rng.mixed_seed(1, 2), "the seed depends on the type of a number"


def test_each_use_of_random_numbers_has_a_separate_stream():
    one, other = (torch.rand(4, generator=rng.generator(42, 0, use)) for use in list(rng.RngStream)[:2])
    assert not torch.equal(one, other)
    assert torch.equal(one, torch.rand(4, generator=rng.generator(42, 0, rng.RngStream.GENERATE)))


def test_draws_inside_a_seeded_block_depend_on_the_seed_and_leave_the_state_outside_as_it_was():
    before = torch.get_rng_state()
    with rng.seeded(torch.device("cpu"), 7):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    with rng.seeded(torch.device("cpu"), 7):
        assert torch.equal(torch.rand(3), inside)
    with rng.seeded(torch.device("cpu"), 8):
        assert not torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("drawn", [0, 3])
def test_the_states_of_a_process_come_back_from_a_file(drawn):
    for _ in range(drawn):
        draws()
    states = json.loads(json.dumps(rng.ProcessRandomStates(single_process()).state_dict()))
    wanted = [draws(), draws()]
    for again in (draws(), draws()):
        assert again not in wanted
    rng.ProcessRandomStates(single_process()).load_state_dict(states)
    assert [draws(), draws()] == wanted


def test_each_process_restores_its_own_state():
    processes = single_process()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(rng.capture())
    wanted = float(torch.rand(()))
    torch.manual_seed(3)
    processes.index = 1
    rng.ProcessRandomStates(processes).load_state_dict(states)
    assert float(torch.rand(())) == wanted


def test_states_without_a_gpu_are_restored_on_any_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    states = rng.capture()
    assert states["cuda"] is None
    first = draws()
    rng.restore(states)
    assert draws() == first


def test_the_streams_have_different_numbers():
    members = rng.RngStream.__members__.values()
    assert len(set(map(int, members))) == len(members)


@pytest.mark.parametrize("error", [None, KeyError("x"), KeyboardInterrupt()])
def test_a_block_leaves_the_random_states_as_they_were(error):
    draws()
    states = rng.capture()
    wanted = draws()
    rng.restore(states)
    with contextlib.suppress(BaseException), rng.unchanged():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
        draws()
        if error is not None:
            raise error
    assert draws() == wanted
