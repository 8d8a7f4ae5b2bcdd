from dataclasses import dataclass

from .base_config import _BaseConfig

@dataclass
class RLOOConfig(_BaseConfig):  # its other fields are those of `trl_compat.trl_trainers.TRLConfig`
    beta: float = ...
