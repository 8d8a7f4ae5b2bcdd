from typing import Any

class BitsAndBytesConfig:
    def __init__(
        self,
        *,
        load_in_4bit: bool = ...,
        bnb_4bit_compute_dtype: Any = ...,
        bnb_4bit_quant_type: str = ...,
        bnb_4bit_use_double_quant: bool = ...,
    ) -> None: ...
