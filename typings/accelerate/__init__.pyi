"""What this package uses of accelerate, typed; see the stubs of transformers."""

from .accelerator import Accelerator as Accelerator
