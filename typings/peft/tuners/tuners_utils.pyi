from collections.abc import Callable
from typing import Any

from torch import nn

class BaseTunerLayer(nn.Module):  # a mixin; every layer that has it is a module
    merged: bool
    __getattr__: Callable[..., Any]
    def get_base_layer(self) -> nn.Module: ...
