"""What this package uses of TRL, typed; see the stubs of transformers."""

from .scripts import DatasetMixtureConfig as DatasetMixtureConfig
from .scripts import ScriptArguments as ScriptArguments
from .scripts import TrlParser as TrlParser
from .scripts import get_dataset as get_dataset
from .trainer import GRPOConfig as GRPOConfig
from .trainer import GRPOTrainer as GRPOTrainer
from .trainer import ModelConfig as ModelConfig
from .trainer import RLOOConfig as RLOOConfig
from .trainer import RLOOTrainer as RLOOTrainer
from .trainer import get_peft_config as get_peft_config
from .trainer import get_quantization_config as get_quantization_config
