"""The trained weights of a module, and files of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trl_trustkl.errors import CheckpointError
from trl_trustkl.run.weights import TrainedWeights, WeightsOnDisk, count, names_in


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
