import os
from typing import Any

class PreTrainedTokenizerBase:
    pad_token: str | None
    bos_token: str | None
    eos_token: str | None
    # None where the tokenizer has no such token.
    pad_token_id: int | Any
    eos_token_id: int | Any
    unk_token_id: int | None
    bos_token_id: int | Any
    chat_template: Any
    def __call__(self, text: str | list[str], *, add_special_tokens: bool = ..., **kwargs: Any) -> Any: ...
    def encode(self, text: str) -> list[int]: ...
    def __len__(self) -> int: ...
    def apply_chat_template(
        self, conversation: Any, *, add_generation_prompt: bool = ..., tokenize: bool = ..., **kwargs: Any
    ) -> Any: ...
    def batch_decode(self, sequences: Any, skip_special_tokens: bool = ..., **kwargs: Any) -> list[str]: ...
    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> tuple[str, ...]: ...
