"""What this package uses of accelerate, typed; see the stubs of transformers."""

from typing import Any

from .accelerator import Accelerator as Accelerator

PartialState: Any
