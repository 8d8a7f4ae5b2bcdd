from collections.abc import Callable

from torch import Tensor

class LogitsProcessor:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor: ...

class LogitsProcessorList(list[Callable[[Tensor, Tensor], Tensor]]): ...
