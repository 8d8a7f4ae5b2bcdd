"""The contexts of an update and of a batch of an evaluation set."""

from __future__ import annotations

from ..parallel.processes import Processes
from ..run import rng
from ..run.state import OnlineTrainerState
from ..types import UpdateContext
from .config import TrustKLPPOConfig


def of_update(args: TrustKLPPOConfig, state: OnlineTrainerState, processes: Processes, local: int) -> UpdateContext:
    """The context of the update that begins, with `local` responses on each process."""
    step, every = state.global_step, args.attribution_every
    return UpdateContext(
        step, True, rng.mixed_seed(args.seed, rng.RngStream.GENERATE, step), first_row=processes.index * local,
        episode=state.episode, random_states=rng.capture(), attributed=every > 0 and (step + 1) % every == 0,
    )  # fmt: skip


def of_evaluation(args: TrustKLPPOConfig, state: OnlineTrainerState, processes: Processes, place: int) -> UpdateContext:
    """The context of a batch of an evaluation set; `place` is the index of its first row among those of this process, which are
    every n-th of the set for n processes."""
    seed = rng.mixed_seed(args.seed, rng.RngStream.EVALUATE)
    first = processes.index + place * processes.count
    return UpdateContext(state.global_step, False, seed, first_row=first, row_step=processes.count)
