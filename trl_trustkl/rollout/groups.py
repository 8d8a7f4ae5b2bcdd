"""Several responses to each prompt: the order of the prompts of a batch."""

from __future__ import annotations

from typing import Protocol


class Order(Protocol):
    """The order of prompts: the rows of the batch of an update, counted from 0, and the batches of a pass over them."""

    batches_per_pass: int

    def rows(self, update: int) -> list[int]: ...


class GroupedOrder:
    """An order in which every prompt comes `size` times in a row, as in TRL's GRPO."""

    def __init__(self, order: Order, size: int) -> None:
        self._order, self.size = order, size
        self.batches_per_pass = order.batches_per_pass

    def rows(self, update: int) -> list[int]:
        """The dataset rows of the responses of `update`, over all processes; the responses to a prompt follow each other."""
        return [row for row in self._order.rows(update) for _ in range(self.size)]
