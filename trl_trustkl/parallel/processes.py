"""Communication between the processes of a run: gather, reduce, agree, fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..masking import masked_moments

Value = TypeVar("Value")


class Processes:
    """The processes of a run. With one process nothing is communicated.

    Each method must be called by all processes, and returns the same on all of them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order. Their number and shape must be the same on each process."""
        return self._accelerator.gather(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over the processes."""
        return self._accelerator.reduce(values, reduction="sum")

    def moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of the values under the mask, of all processes."""
        return masked_moments(self.gather(values), self.gather(mask))

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self.gather(torch.tensor([number], device=self.device)).max())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.max(flag))

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each of the flags is set on any process; the processes give the same number of flags."""
        return self.gather(torch.tensor([list(flags)], device=self.device)).any(0).tolist()

    def gather_objects(self, items: list[Value]) -> list[Value]:
        """The items of all processes, in their order; anything that can be pickled."""
        return gather_object(items)

    def from_main(self, value: Value) -> Value:
        """The main process's value."""
        return broadcast_object_list([value])[0]

    def raise_on_all(self, error: BaseException | None) -> None:
        """Raise the first error of any process on all of them; a process that continued would wait for the others."""
        first = next((each for each in self.gather_objects([error]) if each is not None), None)
        if first is not None:
            raise first

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        self._accelerator.wait_for_everyone()
