from typing import Any

from torch import Tensor, nn

def get_peft_model_state_dict(
    model: nn.Module, *, adapter_name: str = ..., save_embedding_layers: bool | str = ...
) -> dict[str, Tensor]: ...
def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: dict[str, Tensor], adapter_name: str = ...
) -> Any: ...

class ModulesToSaveWrapper(nn.Module):
    modules_to_save: nn.ModuleDict
    original_module: nn.Module
    active_adapters: list[str]

class TrainableTokensWrapper(nn.Module):
    token_adapter: nn.Module
