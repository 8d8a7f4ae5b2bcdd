"""How an update ends that does not end well, and a run before its time: a mixin of the trainer.

Whatever one process meets, a signal or a failing reward function, all of them act on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from ..errors import NonFiniteRewardError, RefusedError, RewardError
from . import rng
from .rng import RngStream
from .signals import Overdue

logger = logging.get_logger(__name__)


class Endings:
    """See the module. The trainer that mixes it in has the state, and `_save_checkpoint`."""

    interrupted: int | None
    """The signal that ended the run, or None."""
    _bad_reward: str | None

    @contextmanager
    def _update_in_hand(self) -> Iterator[None]:
        """One update, whole or not at all: one that is given up leaves nothing behind, and the state before it is saved."""
        update = self.state.global_step
        self._begin_update()
        try:
            yield
        except Overdue:
            self._take_back()
        except RewardError:
            if self.state.global_step > update:  # in an evaluation after it, and on this process alone
                if self.accelerator.num_processes == 1:
                    self._save_what_is_done()
                raise
            self._take_back()
            if not self._highest(self._stop_request.received or 0):  # a signal's own end is near, and saves too
                self._save_what_is_done()
                raise

    @contextmanager
    def _failing_together(self) -> Iterator[list[str]]:
        """Reward functions inside: a failure on one process raises on all, and a reward that is not finite is noted.

        Yields a list that has the reason afterwards if the update is to be refused. Evaluation, in which the processes may
        have different numbers of batches, fails together after them (`Evaluation._evaluated`).
        """
        reasons: list[str] = []
        failure: RewardError | None = None
        try:
            yield reasons
        except RewardError as error:
            failure = error
        if self._sampling_key[0] != RngStream.GENERATE:
            if failure is not None:
                raise failure
            return
        failures = [error for error in gather_object([failure]) if error is not None]
        for error in failures:
            if not isinstance(error, NonFiniteRewardError):
                raise error
        if failures:
            reasons.append(str(failures[0]))
            self._bad_reward = str(failures[0])

    def _take_back(self) -> None:
        """Undo an update that did not come to its end."""
        if self._start is not None:
            self._start.restore()
        self.state.episode -= self.args.batch_size
        rng.restore(self._random_states)

    def _save_what_is_done(self) -> None:
        """A checkpoint of the last finished update, unless there is one or none was finished."""
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)

    def _goes_on(self) -> bool:
        """Whether there is to be another update, the same on every process."""
        self.interrupted = self._highest(self._stop_request.received or 0) or None
        stopped = self.interrupted is not None or self.control.should_training_stop
        return not stopped and self.state.global_step < self.state.max_steps

    def _give_up_if_overdue(self) -> None:
        """Leave the update in hand where a signal's grace period is over on any process."""
        if self._highest(self._stop_request.overdue):
            raise Overdue

    def _highest(self, number: int) -> int:
        """The largest of the processes' numbers, on each of them."""
        return int(self._pooled(torch.tensor([number], device=self.accelerator.device)).max())

    def _stop_if_refused_too_often(self, reason: str | None) -> None:
        count, limit = self._refusals.in_a_row, self.args.max_refused
        if reason is None or count < limit:
            return
        self._save_what_is_done()
        raise RefusedError(
            f"{count} updates in a row were refused (`max_refused` got {limit}), the last one because {reason}. The weights "
            f"are those before them, saved in {Path(self.args.output_dir) / f'checkpoint-{self.state.global_step}'}. Start a "
            "new run from them with a lower learning_rate, with trust_max_kl or with max_grad_norm; see completions.jsonl for "
            "what the rewards were given for."
        )

    def _undo(self, reason: str) -> None:
        """Put policy, value and optimizer back to where the update began, and say why."""
        self._start.restore()
        self._refused = reason
        logger.warning(
            f"update {self.state.global_step + 1} is refused: {reason.rstrip('.')}; the parameters are as they were before it."
        )
