"""The user's functions, by their import paths."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ConfigError, did_you_mean


def load_function(field: str, path: str, valid: str) -> Callable[..., Any]:
    """The function that `module:function`, `module.function` or `path/to/file.py:function` names.

    ConfigError if there is none. `field` is the field that holds the path, `valid` describes its valid values.
    """
    place, _, name = path.rpartition(":" if ":" in path else ".")
    module = _module(field, path, place, valid)
    found = getattr(module, name, None)
    if callable(found):
        return found
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = sorted(key for key, value in functions.items() if getattr(value, "__module__", "") == module.__name__)
    what = "is not callable" if hasattr(module, name) else "does not exist"
    hint = did_you_mean(name, functions)
    there = f".{hint}" if hint else f"; there are: {', '.join(own) or 'none'}."
    raise ConfigError(f"`{field}` got {path!r}, but {name!r} {what}{there}")


def _module(field: str, path: str, place: str, valid: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise ConfigError(f"`{field}` got the file {place!r}; there is no such file.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # `python -m` adds it, an installed command does not
    try:
        return _module_of_file(place) if is_file else importlib.import_module(place)
    except Exception as error:  # whatever the user's module raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and not is_file and f"{place}.".startswith(f"{missing}."):
            raise ConfigError(
                f"`{field}` got {path!r}, but there is no module {missing!r} to import; it must be {valid}."
            ) from None
        raise ConfigError(f"`{field}` got {path!r}; importing it raised {type(error).__name__}: {error}") from error


def _module_of_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"trustkl_file_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # as for any name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be pickled
    spec.loader.exec_module(module)
    return module
