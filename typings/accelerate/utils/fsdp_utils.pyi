from torch import nn

from ..accelerator import Accelerator

def fsdp2_prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module: ...
