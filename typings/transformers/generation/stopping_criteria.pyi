from collections.abc import Callable
from typing import Any

from torch import Tensor

class StoppingCriteria:
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor: ...

class StoppingCriteriaList(list[Callable[..., Tensor]]): ...
