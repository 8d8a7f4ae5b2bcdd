from dataclasses import dataclass

from .base_config import _BaseConfig

@dataclass
class RLOOConfig(_BaseConfig): ...
