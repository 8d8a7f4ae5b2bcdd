"""The snapshot of an update, restored bit for bit: parameters and the state of the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trust.tabular import OPTIMIZERS, Tabular, copies, flat, same
from trl_trustkl.parallel.sharding import Replicated
from trl_trustkl.trust.snapshot import ParameterPath, UpdateSnapshot


class Counting(TorchDispatchMode):
    """Counts operators that copy or compute."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.copies += not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "detach"))
        return func(*args, **(kwargs or {}))


WITH = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def moved(params: list[nn.Parameter], seed: int = 1) -> list[Tensor]:
    """Move the parameters; returns a copy of the new values."""
    with torch.no_grad():
        for p, other in zip(params, parameters(params[0].dtype, seed), strict=True):
            p.add_(0.1 * other)
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_both_ends_of_the_line_are_exact_and_points_between_are_between(dtype):
    params = parameters(dtype)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    end = moved(params)
    for scale in (0.3, 0.0, 1.0, 0.7, 1e-3, 1.0, 0.0):
        line.set_scale(scale)
        for p, a, b in zip(params, start, end, strict=True):
            assert p.dtype == dtype and p.requires_grad
            if scale in (0.0, 1.0):
                assert torch.equal(p, a if scale == 0.0 else b)
            expected = a.double() + scale * (b.double() - a.double())
            torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_path_does_not_change_when_the_parameters_do():
    params = parameters(torch.float32)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    end = moved(params)
    line.set_scale(0.5)
    moved(params, seed=3)
    line.set_scale(1.0)
    assert all(map(torch.equal, params, end))
    line.set_scale(0.0)
    assert all(map(torch.equal, params, start))


def test_a_path_restores_its_start_whatever_the_parameters_are():
    params = parameters(torch.bfloat16)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    with torch.no_grad():
        for p in params:
            p.fill_(math.nan)
    line.set_scale(0.5)  # the end of the path is then the current parameters, which are NaN
    line.set_scale(0.0)
    assert all(map(torch.equal, params, start))
    moved(params)
    line.restore()
    assert all(map(torch.equal, params, start))


def test_the_ends_of_a_path_are_bit_exact_where_a_weight_is_not_finite_or_a_negative_zero():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -0.0, 2.0, -0.0]))
    path = ParameterPath([parameter])
    start, end = parameter.detach().clone(), torch.tensor([torch.nan, torch.inf, -0.0, 3.0])
    with torch.no_grad():
        parameter.copy_(end)
    for scale in (1.0, 0.5, 0.0, 1.0, 0.0):
        path.set_scale(scale)
        if scale != 0.5:
            wanted = (start if scale == 0.0 else end).view(torch.int32)
            assert torch.equal(parameter.detach().view(torch.int32), wanted), scale


@WITH
@pytest.mark.parametrize("steps_before", [0, 2])
def test_after_a_rollback_training_continues_as_if_the_update_had_not_happened(optimizer, steps_before):
    toy, untouched = Tabular(optimizer), Tabular(optimizer)
    for _ in range(steps_before):
        toy.step()
        untouched.step()
    snapshot = toy.snapshot()
    other = copies(toy.other.parameters())
    for _ in range(3):
        toy.step(2.0)
    assert not same(copies(toy.policy.parameters()), copies(untouched.policy.parameters()))
    assert not same(copies(toy.other.parameters()), other)
    apart = [*copies(toy.other.parameters()), *flat([toy.optimizer.state.get(p, {}) for p in toy.other.parameters()])]
    snapshot.restore()
    now = [*copies(toy.other.parameters()), *flat([toy.optimizer.state.get(p, {}) for p in toy.other.parameters()])]
    assert same(now, apart), "parameters outside the update were put back"
    for trained in ("policy", "value"):
        assert same(*(copies(getattr(each, trained).parameters()) for each in (toy, untouched))), trained
    assert all(p.grad is None for p in toy.parameters), "a gradient of the update was kept"
    for each in (toy, untouched):
        each.step()
        each.step()
    for trained in ("policy", "value"):
        assert same(*(copies(getattr(each, trained).parameters()) for each in (toy, untouched))), trained


@WITH
def test_a_state_that_another_snapshot_removed_is_restored(optimizer):
    toy = Tabular(optimizer)
    before_any_step = toy.snapshot()
    toy.step()
    after, expected = toy.snapshot(), toy.everything()
    before_any_step.restore()
    after.restore()
    assert same(toy.everything(), expected)
    toy.step()
    before_any_step.restore()
    after.restore()
    assert same(toy.everything(), expected), "the restored state shares memory with the snapshot"


def test_a_restored_update_takes_the_optimizers_settings_back():
    toy = Tabular("adamw")
    toy.step()
    before = toy.everything()
    snapshot = toy.snapshot()
    toy.optimizer.param_groups[0] |= {"lr": 7.0, "betas": (0.1, 0.2)}
    snapshot.restore()
    assert same(toy.everything(), before)
    toy.optimizer.param_groups[0]["lr"] = 9.0
    snapshot.restore()
    assert same(toy.everything(), before), "the first restore gave out the saved settings themselves"


@pytest.mark.parametrize("staged", [1, 100, 2**26], ids=["each alone", "in groups", "all together"])
def test_the_optimizers_state_is_the_same_however_much_of_it_is_moved_at_a_time(staged, monkeypatch):
    monkeypatch.setattr("trl_trustkl.trust.snapshot.STAGED_BYTES", staged)
    toy = Tabular("adamw")
    toy.step()
    before, snapshot = toy.everything(), toy.snapshot()
    toy.step()
    snapshot.restore()
    assert same(toy.everything(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_point_of_a_path_is_torchs_to_the_bit_for_parameters_of_several_dtypes(dtype):
    params = [*parameters(torch.float32), *parameters(dtype), *parameters(torch.float64)]
    start, path = [p.detach().clone() for p in params], ParameterPath(params)
    end = moved(params[:3]) + moved(params[3:6]) + moved(params[6:])
    path.set_scale(0.3)
    assert all(torch.equal(p, torch.lerp(a, b, 0.3)) for p, a, b in zip(params, start, end, strict=True))


def test_a_snapshot_of_many_parameters_takes_few_operators():
    """Not one for each parameter, nor one transfer for each entry of the optimizer's state."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    with Counting() as taken:
        snapshot = UpdateSnapshot(params, [], optimizer)
    with Counting() as moves:
        snapshot.path.set_scale(0.5)
        snapshot.path.set_scale(0.0)
    assert taken.copies <= 4 and moves.copies <= 6


def test_a_snapshot_shares_no_memory_with_the_parameters():
    toy = Tabular("adamw")
    toy.step()
    snapshot, before = toy.snapshot(), toy.everything()
    state = [entry for parameter in toy.covered for entry in toy.optimizer.state[parameter].values()]
    with torch.no_grad():
        for tensor in [*toy.covered, *state]:
            tensor.fill_(torch.nan)
    snapshot.restore()
    assert same(toy.everything(), before)


def test_a_second_enforcement_moves_along_the_path_of_the_second_update():
    parameter = torch.nn.Parameter(torch.zeros(1))
    path = ParameterPath([parameter])
    for end in (1.0, 10.0):
        parameter.data.fill_(end)
        path.set_end()
        path.set_scale(0.5)
        assert parameter.item() == 0.5 * end
        path.set_scale(1.0)
        assert parameter.item() == end


def test_a_restored_state_holds_no_entry_that_came_after_the_snapshot():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    assert optimizer.state[parameter] == {}
    snapshot = UpdateSnapshot([parameter], [], optimizer)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[parameter]
    snapshot.restore()
    assert optimizer.state[parameter] == {} and not parameter.any()


class Counted(Replicated):
    """Counts how often the parameters were said to be written, each of which has a local part of another type."""

    def __init__(self) -> None:
        self.count = 0

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.data  # another object with the same memory

    def written(self) -> None:
        self.count += 1


def test_what_was_gathered_is_given_up_after_every_change():
    params, sharding = parameters(torch.float32), Counted()
    optimizer = torch.optim.AdamW(params)
    snapshot = UpdateSnapshot(params[:1], params[1:], optimizer, sharding)
    before = [p.detach().clone() for p in params]
    moved(params)
    for scale in (1.0, 0.5, 0.0):
        count = sharding.count
        snapshot.path.set_scale(scale)
        assert sharding.count == count + 1, scale
    snapshot.restore()
    assert sharding.count == 3 + 2, "policy and value are restored"
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
