"""The trained weights of a module, and files of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trl_trustkl.errors import CheckpointError
from trl_trustkl.parallel.sharding import Replicated
from trl_trustkl.run.weights import ShardedOptimizer, TrainedWeights, WeightsOnDisk, count, names_in


def module(seed: int = 0) -> nn.Module:
    """Two layers; the bias of the first one is not trained."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers[0].bias.requires_grad_(False)
    return layers


def test_only_trained_weights_are_counted_and_kept():
    layers = module()
    state = TrainedWeights(layers).state_dict()
    assert list(state) == ["0.weight", "1.weight", "1.bias"]
    assert count(layers) == sum(weight.numel() for weight in state.values()) == 12 + 8 + 2
    assert not any(weight.requires_grad for weight in state.values())


def test_kept_weights_are_contiguous_as_safetensors_needs_them(tmp_path):
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.arange(12.0).view(3, 4).T)
    state = TrainedWeights(layer).state_dict()
    assert torch.equal(state["weight"], layer.weight) and state["weight"].is_contiguous()
    save_file(state, tmp_path / "weights.safetensors")


def test_weights_are_loaded_in_place_and_the_others_stay():
    one, other = module(0), module(1)
    held = [*other.parameters()]
    frozen = other[0].bias.detach().clone()
    unknown = {"of another module": torch.zeros(1)}
    TrainedWeights(other).load_state_dict(TrainedWeights(one).state_dict() | unknown)
    assert torch.equal(one[1].weight, other[1].weight) and torch.equal(other[0].bias, frozen)
    assert all(now is before for now, before in zip(other.parameters(), held, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.bias": torch.zeros(3)}, r"'1.bias' as torch.float32 \[3\]; the model has it as torch.float32 \[2\]"),
        ({"1.bias": torch.zeros(2, dtype=torch.bfloat16)}, "'1.bias' as torch.bfloat16"),
        ({"1.bias": None}, "lacks trained weights of this model, such as '1.bias'"),
    ],
)
def test_weights_of_another_module_are_an_error(change, message):
    weights = TrainedWeights(module()).state_dict() | change
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    with pytest.raises(CheckpointError, match=message):
        TrainedWeights(module()).load_state_dict(weights)


def test_the_weights_of_several_files_are_one_mapping_and_a_missing_file_has_none(tmp_path):
    files = {"a": {"x": torch.ones(2), "y": torch.zeros(1)}, "b": {"z": torch.full((3,), 7.0)}}
    for name, weights in files.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    found = WeightsOnDisk([tmp_path / f"{name}.safetensors" for name in ("a", "b", "missing")])
    assert set(found) == {"x", "y", "z"} and len(found) == 3
    assert torch.equal(found["z"], files["b"]["z"]) and torch.equal(found["x"], files["a"]["x"])
    with pytest.raises(KeyError):
        found["w"]
    assert names_in(tmp_path / "a.safetensors") == {"x", "y"} and names_in(tmp_path / "missing.safetensors") == set()


class Halves(Replicated):
    """Each parameter is sharded into two halves, of which this process has the first; the other process's is known here."""

    def __init__(self, second: dict[int, torch.Tensor]) -> None:
        self.second = second
        self.written_times = 0

    def complete(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, self.second[len(tensor)]]) if tensor.dim() else tensor

    def part(self, complete: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return complete[: len(like)] if complete.dim() else complete

    def written(self) -> None:
        self.written_times += 1


def test_the_state_of_a_sharded_optimizer_is_saved_complete_and_each_process_loads_its_part():
    def stepped(seed: int) -> torch.optim.AdamW:
        torch.manual_seed(seed)
        weights = [torch.nn.Parameter(torch.randn(size)) for size in (3, 2)]
        optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}])
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        return optimizer

    one, other, sharding = stepped(0), stepped(1), Halves({3: torch.full((3,), 7.0), 2: torch.full((2,), 8.0)})
    saved = ShardedOptimizer(one, sharding).state_dict()
    own = one.state_dict()
    assert saved["param_groups"] == own["param_groups"] and saved["state"].keys() == {0, 1}
    for index, second in ((0, sharding.second[3]), (1, sharding.second[2])):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved["state"][index][name], torch.cat([own["state"][index][name], second]))
        assert saved["state"][index]["step"] == 1
    ShardedOptimizer(other, sharding).load_state_dict(saved)
    for index, state in other.state_dict()["state"].items():
        for name, entry in state.items():
            assert torch.equal(entry, own["state"][index][name])


def test_each_process_loads_its_part_of_the_trained_weights_and_gives_up_what_it_had_gathered():
    sharding, layer = Halves({}), torch.nn.Linear(2, 2)
    complete = {"weight": torch.randn(2, 2), "bias": torch.randn(2)}
    TrainedWeights(layer, sharding).load_state_dict(complete)
    assert all(torch.equal(p, complete[name]) for name, p in layer.named_parameters())
    assert sharding.written_times == 1
