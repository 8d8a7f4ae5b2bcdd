"""How an update ends that does not end well. Whatever one process meets, a signal or a failing reward function, all of them
act on together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging

from ..errors import NonFiniteRewardError, RefusedError, RewardError
from ..parallel.processes import Processes
from ..types import UpdateContext
from .signals import Overdue, StopRequest

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class FailureHandling:
    """What the processes of a run do together about signals and failing reward functions."""

    def __init__(self, stop: StopRequest, processes: Processes) -> None:
        self._stop = stop
        self._processes = processes

    def signal(self) -> int | None:
        """The signal that any process received, the same on each; None where there was none."""
        return self._processes.max(self._stop.received or 0) or None

    def give_up_if_overdue(self) -> None:
        """Leave the current update where a signal's grace period is over on any process."""
        if self._processes.any(self._stop.overdue):
            raise Overdue

    @contextmanager
    def update(
        self, finished: Callable[[], bool], roll_back: Callable[[], None], save: Callable[[], None]
    ) -> Iterator[None]:
        """An update inside, complete or not at all: one that is given up is rolled back, and the state before it saved.

        Args:
            finished: whether the update has ended, so that only what came after it failed.
            roll_back: takes the update back.
            save: saves the last finished update.
        """
        try:
            yield
        except Overdue:
            roll_back()
        except RewardError:
            if finished():  # in an evaluation after it, and on this process alone
                if self._processes.count == 1:
                    save()
                raise
            roll_back()
            if self.signal() is None:  # which would save and end the run by itself
                save()
                raise

    def score(self, context: UpdateContext, scoring: Callable[[], Result]) -> Result | None:
        """What `scoring` returns. A failure on one process raises on all; None for rewards that are not finite, whose
        update is to be rejected, as `context.rejected` says then.

        In an evaluation the processes may have different numbers of batches; there a failure raises on its process alone.
        """
        result: Result | None = None
        failure: RewardError | None = None
        try:
            result = scoring()
        except RewardError as error:
            failure = error
        if not context.training:
            if failure is not None:
                raise failure
            return result
        failures = [each for each in self._processes.gather_objects([failure]) if each is not None]
        for each in failures:
            if not isinstance(each, NonFiniteRewardError):
                raise each
        if failures:
            context.rejected = str(failures[0])
            return None
        return result


def reject(context: UpdateContext, reason: str) -> None:
    """Note why the update is rejected, and say so."""
    context.rejected = reason
    logger.warning(
        f"update {context.update + 1} is refused: {reason.rstrip('.')}; the parameters are as they were before it."
    )


def too_many_rejections(count: int, limit: int, reason: str, folder: Path) -> RefusedError:
    """The error that ends a run after `count` rejected updates in a row, its state saved in `folder`."""
    return RefusedError(
        f"{count} updates in a row were refused (`max_refused` got {limit}), the last one because {reason}. The weights "
        f"are those before them, saved in {folder}. Start a new run from them with a lower learning_rate, with trust_max_kl "
        "or with max_grad_norm; see completions.jsonl for what the rewards were given for."
    )
