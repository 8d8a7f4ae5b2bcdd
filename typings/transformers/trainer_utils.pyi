from typing import NamedTuple

class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float
    metrics: dict[str, float]

def get_last_checkpoint(folder: str) -> str | None: ...
def set_seed(seed: int) -> None: ...
