"""PyTorch's module, with its attributes known to a type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Module(nn.Module):
    """nn.Module for which a type checker reports attributes that a class neither assigns nor declares.

    To a checker, `nn.Module.__getattr__` makes any name a tensor or a module, misspelt ones included. The annotations below
    hide that method from it, and have no other effect.
    """

    __getattr__: Callable[..., Any]
    __setattr__: Callable[..., None]
