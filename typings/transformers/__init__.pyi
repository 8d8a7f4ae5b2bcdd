"""What this package uses of transformers, typed, so that a misspelt attribute is an error and not an `Any`.

A name that is missing here is one that the package did not use yet: add it. `tests/test_typings.py` holds every name,
attribute and parameter of these stubs against the installed libraries.
"""

from . import utils as utils
from .configuration_utils import PretrainedConfig as PretrainedConfig
from .generation import CompileConfig as CompileConfig
from .generation import GenerationConfig as GenerationConfig
from .generation import LogitsProcessor as LogitsProcessor
from .generation import LogitsProcessorList as LogitsProcessorList
from .generation import StoppingCriteria as StoppingCriteria
from .generation import StoppingCriteriaList as StoppingCriteriaList
from .modeling_utils import PreTrainedModel as PreTrainedModel
from .models.auto import AutoConfig as AutoConfig
from .models.auto import AutoModelForCausalLM as AutoModelForCausalLM
from .models.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
from .models.auto import AutoTokenizer as AutoTokenizer
from .tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from .trainer import Trainer as Trainer
from .trainer_callback import TrainerCallback as TrainerCallback
from .trainer_callback import TrainerControl as TrainerControl
from .trainer_callback import TrainerState as TrainerState
from .trainer_utils import set_seed as set_seed
from .training_args import TrainingArguments as TrainingArguments
from .utils.quantization_config import BitsAndBytesConfig as BitsAndBytesConfig

__version__: str
