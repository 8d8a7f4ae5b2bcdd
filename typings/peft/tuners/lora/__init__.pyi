from collections.abc import Mapping
from typing import Any

from torch import nn

from ...config import PeftConfig
from ..tuners_utils import BaseTunerLayer

class LoraConfig(PeftConfig):
    def __init__(
        self, *, r: int = ..., lora_alpha: int = ..., target_modules: Any = ..., task_type: Any = ...
    ) -> None: ...

class LoraLayer(BaseTunerLayer):
    base_layer: nn.Module
    # nn.ModuleDict, of which no type says what is in it; of a linear layer, these.
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Dropout | nn.Identity]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

class Linear(LoraLayer):
    def merge(self, safe_merge: bool = ..., adapter_names: list[str] | None = ...) -> None: ...
