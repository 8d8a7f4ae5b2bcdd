"""The state of a run: everything that a checkpoint holds beside weights and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainerState


@dataclass
class OnlineTrainerState(TrainerState):
    """TrainerState with the number of responses sampled so far."""

    episode: int = 0
