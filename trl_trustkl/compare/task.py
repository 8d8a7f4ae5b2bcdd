"""What is trained: the demo's task, or a function of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError

SENTIMENT = "trl_trustkl.demo.task:sentiment_trainer"
SIGNATURE = "(output_dir, *, callbacks=(), **config_changes) -> trainer"


def resolve(task: str) -> str:
    """The task as another process finds it: the path of a file made absolute."""
    place, _, name = task.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(
            f"`task` got {task!r}; it must be module:function or path/to/file.py:function, a function {SIGNATURE}."
        )
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else task


def load(task: str) -> Callable[..., Any]:
    """The function that `task` names, as `resolve` returns it; ConfigError where there is none that could be called."""
    place, _, name = resolve(task).rpartition(":")
    module = _module(task, place)
    function = getattr(module, name, None)
    if not callable(function):
        import difflib

        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"`task` got {task!r}, but {place} has no function {name!r}.{hint}")
    try:
        inspect.signature(function).bind("folder", callbacks=(), seed=1, max_steps=1)
    except TypeError as error:
        raise ConfigError(f"`task` got {task!r}, which cannot be called as {SIGNATURE}: {error}.") from None
    return function


def _module(task: str, place: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there, `python -m` does
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"trustkl_task_{Path(place).stem}", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that what it defines can be pickled
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"`task` got {task!r}, but {place} cannot be imported ({type(error).__name__}: {error}); it must be "
            "module:function or path/to/file.py:function."
        ) from error
