"""`Module` behaves as PyTorch's module at run time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_trustkl.trl_compat.module import Module


class Scale(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 1)
        self.name = "scale"


def test_parameters_and_modules_are_registered_as_by_pytorch():
    module = Scale()
    assert set(dict(module.named_parameters())) == {"weight", "inner.weight", "inner.bias"}
    assert module.inner is module.get_submodule("inner") and module.name == "scale"
    del module.weight
    assert "weight" not in dict(module.named_parameters())


def test_the_annotations_define_nothing():
    assert Module.__getattr__ is nn.Module.__getattr__ and Module.__setattr__ is nn.Module.__setattr__
    with pytest.raises(AttributeError, match="'Scale' object has no attribute 'wieght'"):
        _ = Scale().wieght
