"""What is trained: the demo's task, or a function of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..import_paths import load_function

SENTIMENT = "trl_trustkl.demo.task:sentiment_trainer"
SENTIMENT_GRPO = "trl_trustkl.demo.task:sentiment_grpo_trainer"
SIGNATURE = "(output_dir, *, callbacks=(), **config_changes) -> trainer"
VALID = f"module:function or path/to/file.py:function, a function {SIGNATURE}"


def resolve(task: str) -> str:
    """The task's name for another process: the path of a file becomes absolute."""
    place, _, name = task.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"`task` got {task!r}; it must be {VALID}.")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else task


def load(task: str) -> Callable[..., Any]:
    """The function that `task` names, as `resolve` returns it; ConfigError if it does not exist or cannot be called."""
    function = load_function("task", resolve(task), VALID)
    try:
        inspect.signature(function).bind("folder", callbacks=(), seed=1, max_steps=1)
    except TypeError as error:
        raise ConfigError(f"`task` got {task!r}, which cannot be called as {SIGNATURE}: {error}.") from None
    return function
