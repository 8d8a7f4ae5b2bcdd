from enum import Enum
from typing import Any, TypeVar

_T = TypeVar("_T")

class DistributedDataParallelKwargs:
    def __init__(
        self,
        *,
        find_unused_parameters: Any = ...,
        bucket_cap_mb: Any = ...,
        broadcast_buffers: Any = ...,
        static_graph: Any = ...,
    ) -> None: ...

class DistributedType(Enum):
    DEEPSPEED = ...
    FSDP = ...
    NO = ...

FullyShardedDataParallelPlugin: Any

def gather_object(object: list[_T]) -> list[_T]: ...
def broadcast_object_list(object_list: list[_T], from_process: int = ...) -> list[_T]: ...
def parse_flag_from_env(key: str, default: bool = ...) -> bool: ...
