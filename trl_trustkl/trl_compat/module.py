"""PyTorch's module, with its attributes known to a type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Module(nn.Module):
    """nn.Module, except for a type checker: it knows what a class assigns or declares, and reports any other attribute.

    `nn.Module.__getattr__` makes any name a tensor or a module, misspelt ones included. The annotations below hide it from
    the checker, and do nothing else.
    """

    __getattr__: Callable[..., Any]
    __setattr__: Callable[..., None]
