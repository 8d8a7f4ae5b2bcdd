import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .configuration_utils import PretrainedConfig
from .generation import GenerationConfig, LogitsProcessorList

class PreTrainedModel(nn.Module):
    # Not a method: by nn.Module's, any name would be a tensor or a module.
    __getattr__: Callable[..., Any]
    config: PretrainedConfig
    generation_config: GenerationConfig
    base_model_prefix: str
    name_or_path: str
    def can_generate(self) -> bool: ...
    def generate(
        self, inputs: Tensor | None = ..., generation_config: GenerationConfig | None = ..., **kwargs: Any
    ) -> Any: ...
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Linear | None: ...
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = ...) -> None: ...
    def gradient_checkpointing_disable(self) -> None: ...
    def enable_input_require_grads(self) -> None: ...
    def add_model_tags(self, tags: list[str] | str) -> None: ...
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = ..., **kwargs: Any
    ) -> None: ...
