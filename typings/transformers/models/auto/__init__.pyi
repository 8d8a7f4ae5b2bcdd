import os
from typing import Any

from ...configuration_utils import PretrainedConfig
from ...modeling_utils import PreTrainedModel
from ...tokenization_utils_base import PreTrainedTokenizerBase

class AutoConfig:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> PretrainedConfig: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, *model_args: Any, **kwargs: Any) -> PreTrainedModel: ...
    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel: ...

class AutoModelForSequenceClassification:
    @classmethod
    def from_pretrained(cls, *model_args: Any, **kwargs: Any) -> PreTrainedModel: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> PreTrainedTokenizerBase: ...
