from torch import nn

from .config import PeftConfig
from .peft_model import PeftModel

def get_peft_model(model: nn.Module, peft_config: PeftConfig) -> PeftModel: ...
