from . import logits_process as logits_process
from .configuration_utils import GenerationConfig as GenerationConfig
from .logits_process import LogitsProcessor as LogitsProcessor
from .logits_process import LogitsProcessorList as LogitsProcessorList
