"""The module around a model that an engine shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..trl_compat.module import Module


class Root(Module):
    """A model, with what accelerate and the engines read of a model.

    The model's parts are called on their own, such as its backbone. With `call` this is a pass of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, call: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The result of `call`, or of the model."""
        return self.model(*args, **kwargs) if call is None else call()

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the layers, each of which is gathered by itself. A value head is one, as it has another dtype."""
        present = {type(module).__name__ for module in self.modules()}
        named = {name for m in self.model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
        return sorted(present & {*named, "ValueHead"})

    def tie_weights(self) -> None:
        """Tie the weights again that accelerate has loaded one by one."""
        for module in self.model.modules():
            if (tie := getattr(module, "tie_weights", None)) is not None:
                tie()
