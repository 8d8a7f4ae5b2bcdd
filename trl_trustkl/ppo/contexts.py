"""The contexts of an update and of a batch of an evaluation set."""

from __future__ import annotations

from ..run import rng
from ..run.state import OnlineTrainerState
from ..types import UpdateContext
from .config import TrustKLPPOConfig


def of_update(args: TrustKLPPOConfig, state: OnlineTrainerState, process: int) -> UpdateContext:
    """The context of the update that begins."""
    step = state.global_step
    seed = rng.mixed_seed(args.seed, rng.RngStream.GENERATE, step, process)
    every = args.attribution_every
    attributed = every > 0 and (step + 1) % every == 0
    return UpdateContext(step, True, seed, episode=state.episode, random_states=rng.capture(), attributed=attributed)


def of_evaluation(args: TrustKLPPOConfig, state: OnlineTrainerState, process: int, place: int) -> UpdateContext:
    """The context of a batch of an evaluation set; `place` is the index of its first row on this process."""
    seed = rng.mixed_seed(args.seed, rng.RngStream.EVALUATE, place, process)
    return UpdateContext(state.global_step, False, seed)
