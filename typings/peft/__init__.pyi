"""What this package uses of PEFT, typed; see the stubs of transformers."""

from .config import PeftConfig as PeftConfig
from .mapping_func import get_peft_model as get_peft_model
from .peft_model import PeftModel as PeftModel
from .tuners import LoraConfig as LoraConfig
from .utils import get_peft_model_state_dict as get_peft_model_state_dict
from .utils import set_peft_model_state_dict as set_peft_model_state_dict
