from typing import NamedTuple

class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float
    metrics: dict[str, float]

def set_seed(seed: int) -> None: ...
