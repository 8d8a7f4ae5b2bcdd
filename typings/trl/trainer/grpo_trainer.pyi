from typing import Any

from .base_trainer import _BaseTrainer
from .grpo_config import GRPOConfig

class GRPOTrainer(_BaseTrainer):
    def __init__(
        self,
        model: Any,
        reward_funcs: Any = ...,
        args: GRPOConfig | None = ...,
        train_dataset: Any = ...,
        eval_dataset: Any = ...,
        processing_class: Any = ...,
        reward_processing_classes: Any = ...,
        callbacks: Any = ...,
        optimizers: Any = ...,
        *,
        peft_config: Any = ...,
    ) -> None: ...
