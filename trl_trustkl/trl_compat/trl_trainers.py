"""Types of the attributes of TRL's trainers and their configurations that callbacks and records read."""

from __future__ import annotations

from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class TRLConfig(Protocol):
    """The fields of `GRPOConfig`, `RLOOConfig` and TRL's `PPOConfig`; each of these has some of them."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    max_grad_norm: float | None
    optim: str
    torch_compile: bool
    enable_jit_checkpoint: bool
    # -- GRPO and RLOO
    beta: float
    num_iterations: int
    steps_per_generation: int
    generation_batch_size: int
    max_completion_length: int | None
    epsilon: float
    epsilon_high: float | None
    # -- GRPO
    loss_type: str
    importance_sampling_level: str
    # -- PPO
    kl_coef: float
    kl_estimator: str
    cliprange: float
    cliprange_value: float
    num_ppo_epochs: int


class TRLTrainer(Protocol):
    """GRPOTrainer, RLOOTrainer, or TRL's PPOTrainer, which has neither `beta` nor `_metrics`."""

    args: TRLConfig
    callback_handler: CallbackHandler
    beta: float
    _metrics: dict[str, dict[str, list[float]]]

    def add_callback(self, callback: TrainerCallback) -> None: ...


class GenerationTrainer(TRLTrainer, Protocol):
    """GRPOTrainer or RLOOTrainer, which train on batches that they generate."""

    model: Any
    model_wrapped: Any
    ref_model: Any
    accelerator: Accelerator
    optimizer: Any
    train_dataset: Any
    processing_class: Any
    temperature: float
    reward_func_names: list[str]
    reward_weights: Tensor
    is_in_train: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _buffered_inputs: list[dict[str, Tensor]] | None
    _step: int
    _logs: dict[str, Any]


def steps_in_backward(args: TRLConfig) -> bool:
    """Whether the optimizer steps within the backward pass, so that no event comes before the step."""
    name = str(getattr(args.optim, "value", args.optim))
    return name in ("lomo", "adalomo") or name.endswith("_layerwise")
