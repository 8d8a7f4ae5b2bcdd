from typing import Any

class PeftConfig:
    base_model_name_or_path: str | None
    revision: str | None
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> PeftConfig: ...
    @property
    def is_prompt_learning(self) -> bool: ...
    def to_dict(self) -> dict[str, Any]: ...
