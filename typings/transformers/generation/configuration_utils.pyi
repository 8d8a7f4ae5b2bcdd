from typing import Any

class GenerationConfig:
    max_new_tokens: int
    do_sample: bool
    pad_token_id: int
    eos_token_id: int | list[int] | None
    def __init__(self, **kwargs: Any) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
    def validate(self) -> None: ...
