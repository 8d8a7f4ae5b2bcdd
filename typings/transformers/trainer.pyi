from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .tokenization_utils_base import PreTrainedTokenizerBase
from .trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState
from .trainer_utils import TrainOutput
from .training_args import TrainingArguments

OPTIMIZER_NAME: str
SCALER_NAME: str
SCHEDULER_NAME: str
TRAINER_STATE_NAME: str

class Trainer:
    args: TrainingArguments
    accelerator: Accelerator
    model: nn.Module
    model_wrapped: nn.Module
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None
    _created_lr_scheduler: bool
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    is_in_train: bool
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    hub_model_id: str | None

    def __init__(
        self,
        model: nn.Module | None = ...,
        args: TrainingArguments | None = ...,
        data_collator: Callable[[list[Any]], Any] | None = ...,
        train_dataset: Dataset | None = ...,
        eval_dataset: Dataset | dict[str, Dataset] | None = ...,
        processing_class: PreTrainedTokenizerBase | None = ...,
        *,
        callbacks: list[TrainerCallback] | None = ...,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = ...,
    ) -> None: ...
    def train(
        self, resume_from_checkpoint: str | bool | None = ..., trial: Any = ..., ignore_keys_for_eval: Any = ...
    ) -> TrainOutput: ...
    def evaluate(
        self, eval_dataset: Any = ..., ignore_keys: list[str] | None = ..., metric_key_prefix: str = ...
    ) -> dict[str, float]: ...
    def log(self, logs: dict[str, float], start_time: float | None = ...) -> None: ...
    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None: ...
    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None: ...
    def is_world_process_zero(self) -> bool: ...
    def is_local_process_zero(self) -> bool: ...
    def create_optimizer(self, model: nn.Module | None = ...) -> Optimizer: ...
    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = ...) -> LRScheduler: ...
    def _get_learning_rate(self) -> float: ...
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool: ...
    # -- saving and loading
    def save_model(self, output_dir: str | None = ..., _internal_call: bool = ...) -> None: ...
    def _save(self, output_dir: str | None = ..., state_dict: dict[str, Tensor] | None = ...) -> None: ...
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None: ...
    def _load_callback_state(self) -> None: ...
    def _load_best_model(self) -> None: ...
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None: ...
    def push_to_hub(self, commit_message: str | None = ..., **kwargs: Any) -> Any: ...
