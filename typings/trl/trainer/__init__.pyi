from .grpo_config import GRPOConfig as GRPOConfig
from .grpo_trainer import GRPOTrainer as GRPOTrainer
from .model_config import ModelConfig as ModelConfig
from .rloo_config import RLOOConfig as RLOOConfig
from .rloo_trainer import RLOOTrainer as RLOOTrainer
from .utils import get_peft_config as get_peft_config
from .utils import get_quantization_config as get_quantization_config
