from typing import Any

from transformers import Trainer

class _BaseTrainer(Trainer):
    _tag_names: list[str]
    _name: str
    _paper: dict[str, Any]

    def create_model_card(
        self, model_name: str | None = ..., dataset_name: str | None = ..., tags: str | list[str] | None = ...
    ) -> None: ...
