from dataclasses import dataclass

from transformers import TrainingArguments

@dataclass
class _BaseConfig(TrainingArguments): ...
