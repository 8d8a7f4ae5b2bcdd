"""What this package uses of PyYAML, typed; see the stubs of transformers."""

from typing import Any

from . import constructor as constructor
from .error import YAMLError as YAMLError
from .loader import SafeLoader as SafeLoader

def load(stream: bytes | str, Loader: type[SafeLoader]) -> Any: ...
def safe_load(stream: str) -> Any: ...
