from . import logits_process as logits_process
from .configuration_utils import CompileConfig as CompileConfig
from .configuration_utils import GenerationConfig as GenerationConfig
from .logits_process import LogitsProcessor as LogitsProcessor
from .logits_process import LogitsProcessorList as LogitsProcessorList
from .stopping_criteria import StoppingCriteria as StoppingCriteria
from .stopping_criteria import StoppingCriteriaList as StoppingCriteriaList
