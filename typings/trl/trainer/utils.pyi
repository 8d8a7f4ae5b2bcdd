from typing import Any

from .model_config import ModelConfig

def get_peft_config(model_args: ModelConfig) -> Any: ...
def get_quantization_config(model_args: ModelConfig) -> Any: ...
def print_prompt_completions_sample(
    prompts: list[Any],
    completions: list[Any],
    rewards: dict[str, list[float]],
    advantages: list[float] | None,
    step: int,
    num_samples: int | None = ...,
    extra: dict[str, list[Any]] | None = ...,
) -> None: ...
