"""Failures during an update. All processes react together to a signal or an error that any one of them gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging

from ..errors import DataError, NonFiniteRewardError, RefusedError, RewardError, RolloutError
from ..parallel.processes import Processes
from ..types import UpdateContext
from .signals import Overdue, StopRequest

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


@contextmanager
def raised_on_all(processes: Processes, *kinds: type[Exception]) -> Iterator[None]:
    """Raise an error of these kinds on all processes if any of them raises it in the block. Called by all processes."""
    failure: Exception | None = None
    try:
        yield
    except kinds as error:
        failure = error
    processes.raise_on_all(failure)


class FailureHandling:
    """How the processes of a run react together to signals and to failing reward functions.

    in_step: whether they make the same passes in an evaluation too, so that none may end it alone.
    """

    def __init__(self, stop: StopRequest, processes: Processes, *, in_step: bool = False) -> None:
        self._in_step = in_step
        self._stop = stop
        self._processes = processes

    def signal(self) -> int | None:
        """The signal that any process received, the same on each; None if there was none."""
        return self._processes.max(self._stop.received or 0) or None

    def drop_closed_outputs(self) -> None:
        """See `StopRequest`."""
        self._stop.drop_closed_outputs()

    def give_up_if_overdue(self) -> None:
        """Raise Overdue if a signal's grace period is over on any process."""
        if self._processes.any(self._stop.overdue):
            raise Overdue

    @contextmanager
    def update(
        self, finished: Callable[[], bool], roll_back: Callable[[], None], save: Callable[[], None]
    ) -> Iterator[None]:
        """Run an update in the block completely or not at all: an abandoned update is rolled back.

        Args:
            finished: whether the update had ended; an error then comes from what ran after it.
            roll_back: rolls the update back.
            save: saves the last finished update; called before the error of a reward function, of the data or of the rollout
                engine is raised.
        """
        try:
            yield
        except Overdue:
            if not finished():  # otherwise an evaluation after the update was given up
                roll_back()
        except (RewardError, DataError, RolloutError):
            if finished():  # in an evaluation after the update, which raises on one process
                if self._processes.count == 1:
                    save()
                raise
            roll_back()
            if self.signal() is None:  # a signal saves and ends the run anyway
                save()
                raise

    def score(self, context: UpdateContext, scoring: Callable[[], Result]) -> Result | None:
        """Return what `scoring` returns; a failure on one process is raised on all of them.

        For rewards that are not finite, returns None and sets `context.rejected`, so that the update is rejected. In an
        evaluation, where the processes may have different numbers of batches, a failure is raised only on its process,
        unless they are in step.
        """
        if not context.training and not self._in_step:
            return scoring()
        result: Result | None = None
        failure: RewardError | None = None
        try:
            result = scoring()
        except RewardError as error:
            failure = error
        failures = [each for each in self._processes.gather_objects([failure]) if each is not None]
        for each in failures:
            if not (context.training and isinstance(each, NonFiniteRewardError)):
                raise each
        if failures:
            context.rejected = str(failures[0])
            return None
        return result


def reject(context: UpdateContext, reason: str) -> None:
    """Store why the update is rejected, and log it unless it is a rerun."""
    context.rejected = reason
    if context.without is not None:
        return
    logger.warning(f"update {context.update + 1} is rejected: {reason.rstrip('.')}; the parameters were restored.")


def too_many_rejections(count: int, limit: int, reason: str, folder: Path) -> RefusedError:
    """The error that ends a run after `count` rejected updates in a row, with its state saved in `folder`."""
    return RefusedError(
        f"{count} updates in a row were rejected (max_refused={limit}). The last reason: {reason.rstrip('.')}. The "
        f"weights from before these updates are saved in {folder}. Start a new run from them with a lower learning_rate, with "
        "trust_max_kl or with max_grad_norm; completions.jsonl has the completions and their scores."
    )
